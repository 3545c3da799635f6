"""Adapters beside one base: every request gets the numbers of the model with its adapter merged in."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.inference.quantize import QuantConfig
from sharding.plan import Plan
from tessera.lm import lora
from tessera.models.attention_forms import LatentConfig
from tessera.parallel.decoder import dequantize_layer
from tessera.serving.adapters import save_adapters
from tessera.serving.engine import Engine, generate_all
from tessera.serving.families import NotConvertible
from tessera.serving.huggingface import load_directory
from tessera.serving.load import DraftConfig, SourceConfig, make_engine
from tessera.serving.multi_lora import load_stacked, named
from tessera.serving.pages import Pool
from tessera.serving.quantized import quantise_decoder
from tessera.serving.requests import OutOfRange, Sampling
from tessera.serving.scoring import Part, score
from tessera.serving.speculative import Speculating

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = ("", "A", "B")
PROMPTS = [[5, 6, 7], list(range(40, 56)), [1, 2, 3, 4]]
LONG = list(range(100, 125))  # read in two chunks
ASKED = Sampling(temperature=0.0, max_tokens=6, prompt_logprobs=True)


def check(text, params, config=tiny.CONFIG):
    """A greedy text's tokens and log-probabilities, and its prompt's, are those of the decoder without a cache."""
    whole = [*text.prompt, *text.tokens]
    expected = tiny.logprobs(whole, params, config)
    first = len(text.prompt) - 1
    assert text.tokens == expected[first:-1].argmax(-1).tolist()
    wanted = expected[np.arange(len(whole) - 1), whole[1:]]
    np.testing.assert_allclose(text.logprobs, wanted[first:], atol=1e-4)
    if text.sampling.prompt_logprobs:
        np.testing.assert_allclose(text.prompt_logprobs, wanted[:first], atol=1e-4)


def test_rows_of_one_batch_have_the_numbers_of_their_merged_adapters():
    for order in (NAMES, ("B", "", "A")):
        asked = [replace(ASKED, adapter=name) for name in order]
        for name, text in zip(order, generate_all(tiny.adapted_engine(), PROMPTS, asked), strict=True):
            check(text, tiny.merged(name))
    only = generate_all(tiny.adapted_engine(), PROMPTS[2:], [replace(ASKED, adapter="A")])[0]
    assert only.logprobs == text.logprobs  # batch invariance, bit for bit
    # The tokens are others', too: the tolerance hides nothing.
    texts = [tuple(tiny.logits(PROMPTS[1], tiny.merged(name)).argmax(-1)) for name in NAMES]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("pages", [0, pytest.param(12, marks=pytest.mark.slow)])
def test_a_prefix_of_another_adapter_is_read_again(pages):
    """One prompt with every adapter, after and beside the others; only the second of each finds it in the cache."""
    one = tiny.adapted_engine(replace(tiny.SIZES, pages=pages, page_size=16), prefix_cache=4)
    asked = {name: replace(ASKED, adapter=name, prompt_logprobs=False) for name in NAMES}
    running = one.submit(LONG, asked["A"])
    while not running.tokens:
        one.step()
    beside = [one.submit(LONG, asked[name]) for name in ("B", "")]  # what runs is of another
    one.run()
    assert one.counts["prefix_tokens"] == 0
    for name in ("B", "A", ""):
        before = one.counts["prefix_tokens"]
        check(generate_all(one, [LONG], [asked[name]])[0], tiny.merged(name))
        assert one.counts["prefix_tokens"] - before == len(LONG) - 1
    for text in (running, *beside):
        check(text, tiny.merged(text.sampling.adapter))


def test_pages_of_texts_that_ended_are_found_by_their_adapter():
    pool, text = Pool(pages=4, size=2), np.array([7, 8, 9])
    pool.begin("a", pool.find(text, [], 1), room=4)
    pool.end("a", text, 1)
    assert [pool.find(text, [], adapter).shared for adapter in (0, 1, 2)] == [0, 3, 0]
    pool.begin("b", pool.find(text, []), room=5)  # needs a page of it: what is left is still of that adapter
    assert [pool.find(text, [], adapter).shared for adapter in (0, 1, 2)] == [0, 2, 0]


def quantized(bits):
    return lambda params: quantise_decoder(params, tiny.CONFIG, QuantConfig(bits))


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_the_base_may_be_quantized(bits):
    """As `lora.apply` adds an adapter to a quantized kernel; kernels stay quantized, and are made float by layer."""
    small = quantized(bits)
    made, params = tiny.adapted_programs(replace(tiny.SIZES, layout="stacked"), change=small)
    asked = [replace(ASKED, adapter=name) for name in NAMES]
    texts = generate_all(Engine(made, params, adapters=tuple(tiny.LORA)), PROMPTS, asked)
    rounded = small(tiny.weights())
    for name, text in zip(NAMES, texts, strict=True):
        merged = lora.apply(rounded, tiny.adapters(name), tiny.LORA[name]) if name else rounded
        check(text, dequantize_layer(merged, "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["tp=2", "dp=2", "tp=4", "pp=2, dp=2", "fsdp=2, tp=2", "cp=2, tp=2"])
def test_plans_split_adapters_like_their_kernels(axes):
    """Also tp=4 of two key/value heads, which are repeated; a prompt of two chunks, and more texts than slots."""
    one = tiny.adapted_engine(axes=axes)
    prompts, names = [*PROMPTS, LONG, LONG, PROMPTS[1]], [*NAMES, "B", "", "A"]
    asked = [replace(ASKED, adapter=name) for name in names]
    for name, text in zip(names, generate_all(one, prompts, asked), strict=True):
        check(text, tiny.merged(name))
    of_kernels = one.params["adapters"]["blocks"]["mlp"]
    if "tp" in axes:
        shards = {side: of_kernels["down"]["kernel"][side].sharding.spec for side in "ab"}
        assert "tp" in shards["a"] and "tp" not in shards["b"]
        assert "tp" in of_kernels["up"]["kernel"]["b"].sharding.spec


# The first layer is dense, every second after that is routed: stacks, and units of several layers.
ROUTED = replace(tiny.CONFIG, layers=5, mlp="routed")
ROUTED = replace(ROUTED, moe=MoEConfig(router=RouterConfig(experts=4, k=2), every=2, first_k_dense_replace=1))
LATENT = LatentConfig(kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8, q_rank=6)
OTHERS = {
    "routed": (ROUTED, {"dense_blocks/mlp/up", "blocks/layer_0/mlp/up", "blocks/layer_1/attention/key"}),
    "latent": (replace(tiny.CONFIG, kv_heads=0, latent=LATENT), {"blocks/attention/query_down", "blocks/mlp/down"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name, axes", [("routed", ""), ("routed", "ep=2, tp=2"), ("latent", "tp=2")])
def test_other_models_have_adapters_of_what_is_a_projection(name, axes):
    config, some = OTHERS[name]
    assert {f"{path}/kernel" for path in some} <= {path for path, _ in lora.pairs(tiny.adapters("B", config))}
    one = tiny.adapted_engine(config=config, axes=axes)
    asked = [replace(ASKED, adapter=name) for name in NAMES]
    for name, text in zip(NAMES, generate_all(one, [*PROMPTS[:2], LONG], asked), strict=True):
        check(text, tiny.merged(name, config), config)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Golden model, with a tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    file = tmp_path_factory.mktemp("llama") / "words.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")).save(str(file))
    return SourceConfig(str(GOLDEN / "huggingface" / "llama"), tokenizer=str(file))


def test_a_directory_of_peft_beside_its_base_gives_the_logits_of_peft(llama, golden):
    sizes = replace(tiny.SIZES, length=32)
    one, loaded = make_engine(llama, Plan(), sizes, adapters={"theirs": str(GOLDEN / "lora" / "llama")})
    case = golden("lora")
    asked = replace(ASKED, max_tokens=1, adapter="theirs")
    for tokens, logits in zip(case["tokens"], case["llama"]["logits"].astype(np.float64), strict=True):
        wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        text = generate_all(one, [tokens.tolist()], [asked])[0]
        np.testing.assert_allclose(text.prompt_logprobs, wanted[np.arange(len(tokens) - 1), tokens[1:]], atol=1e-4)
        assert text.tokens == [wanted[-1].argmax()]
        plain = score(one, [Part(tuple(tokens[:1].tolist()), tuple(tokens[1:].tolist()))])[0].logprobs
        assert np.abs(np.subtract(plain, text.prompt_logprobs)).max() > 0.1
        theirs = score(one, [Part(tuple(tokens[:1].tolist()), tuple(tokens[1:].tolist()))], adapter="theirs")[0]
        assert theirs.logprobs == pytest.approx(text.prompt_logprobs, abs=1e-5)
    where, unrolled = {"theirs": str(GOLDEN / "lora" / "llama")}, replace(loaded.config, scan=False)
    found, unrolled = (load_stacked(where, config) for config in (loaded.config, unrolled))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, unrolled))
    with pytest.raises(OutOfRange, match=r"adapter='ours' must be \"\" or one of the adapters \['theirs'\]"):
        one.submit([1], Sampling(adapter="ours"))


def test_adapters_that_do_not_fit_are_refused_with_their_file(llama, tmp_path):
    qwen, missing = GOLDEN / "lora" / "qwen2", tmp_path / "missing"
    with pytest.raises(NotConvertible, match="lora/qwen2/adapter_model.safetensors: "):
        make_engine(llama, Plan(), tiny.SIZES, adapters={"a": str(GOLDEN / "lora" / "llama"), "b": str(qwen)})
    with pytest.raises(FileNotFoundError, match=f"{missing} has no adapter_config.json"):
        make_engine(llama, Plan(), tiny.SIZES, adapters={"a": str(missing)})
    with pytest.raises(ValueError, match=r"adapters \['a'\] beside ticket='t': what they add would fill its zeros"):
        make_engine(replace(llama, ticket="t"), Plan(), tiny.SIZES, adapters={"a": "b"})
    params, mixtral = load_directory(GOLDEN / "huggingface" / "mixtral")
    config = lora.LoRAConfig(rank=2, targets="router/kernel$")
    router = lora.initialize(jax.tree.map(jnp.asarray, params), config, key=jax.random.key(0))
    saved = save_adapters(tmp_path / "router", router, config, mixtral)
    with pytest.raises(NotConvertible, match=f"{saved}/adapter_model.safetensors: the adapter 'r' changes .*router"):
        load_stacked({"r": str(saved)}, mixtral)


@pytest.mark.parametrize(
    "entries, message",
    [
        (["a"], "'a': an adapter is NAME=DIRECTORY"),
        (["=b"], "'=b': an adapter is NAME=DIRECTORY"),
        (["a="], "'a=': an adapter is NAME=DIRECTORY"),
        (["a=b", "a=c"], "'a=c': b has the name 'a' too"),
        (["tessera=b"], "'tessera=b': the model has the name 'tessera' too"),
    ],
)
def test_names_are_checked(entries, message):
    with pytest.raises(ValueError, match=message):
        named(entries, "tessera")
    assert named(["a=s3://b/c=d"]) == {"a": "s3://b/c=d"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "lookup"])
def test_drafts_are_checked_with_the_adapter_of_the_row(how):
    """A draft is the base's or of the text; what stays is the adapter's own."""
    if how == "lookup":
        one = tiny.adapted_engine(lookup=2, drafted=3)
    else:
        (target, params), (draft, small) = tiny.adapted_programs(), tiny.programs()
        both = Speculating(target, draft, 3)
        one = Engine(both, both.place(params, small), adapters=tuple(tiny.LORA))
    asked = [replace(ASKED, adapter=name, max_tokens=40, prompt_logprobs=False) for name in NAMES]
    for name, text in zip(NAMES, generate_all(one, PROMPTS, asked), strict=True):
        check(text, tiny.merged(name))
    assert 0 < one.counts["accepted"] < one.counts["drafted"]


@pytest.mark.slow
def test_a_models_own_layers_draft_for_it_beside_adapters(llama):
    given = {"adapters": {"theirs": str(GOLDEN / "lora" / "llama")}}
    sizes = replace(tiny.SIZES, length=32)
    plain, _ = make_engine(llama, Plan(), sizes, **given)
    both, _ = make_engine(llama, Plan(), sizes, draft=DraftConfig(layers=1, tokens=2), **given)
    asked = [replace(ASKED, max_tokens=10, adapter=name, prompt_logprobs=False) for name in ("theirs", "")]
    prompts = [[5, 6, 7], [1, 2]]
    texts = [[one.tokens for one in generate_all(engine, prompts, asked)] for engine in (plain, both)]
    assert texts[0] == texts[1]
