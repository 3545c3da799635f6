"""lm-evaluation-harness: our model in process and behind the server scores as transformers does (`make test-harness`).

The task's data are local files; the model is a random one that transformers made.
"""

import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from sharding.plan import Plan
from tessera.data.text import BPETokenizer
from tessera.serving.app import make_app
from tessera.serving.harness import harness_model
from tessera.serving.load import SourceConfig, make_engine
from tessera.serving.process import make_server
from tessera.serving.programs import ServeConfig
from tessera.serving.schema import AppConfig
from tessera.serving.service import Service

lm_eval = pytest.importorskip("lm_eval", reason="no lm-eval: make test-harness")
pytestmark = pytest.mark.slow
SOURCE = Path(__file__).parents[2] / "golden" / "huggingface" / "llama"
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["~"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}+{% endif %}"
)


@pytest.fixture(scope="module", params=["texts", "chats"])
def place(request, tmp_path_factory):
    """A model's directory, and tasks in YAML beside their data; chats begin as every text of their tokenizer does."""
    root = tmp_path_factory.mktemp("harness")
    shutil.copytree(SOURCE, root / "model")
    size = json.loads((SOURCE / "config.json").read_text())["vocab_size"]
    package = pytest.importorskip("tokenizers")
    letters = {"<s>": 1, "</s>": 2} | {chr(33 + i): i for i in range(size) if i not in (1, 2)}
    inner = package.Tokenizer(package.models.BPE(letters, [], unk_token="!"))
    inner.decoder = package.decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    if request.param == "chats":
        begun = {"single": "<s> $A", "pair": "<s> $A $B", "special_tokens": [("<s>", 1)]}
        inner.post_processor = package.processors.TemplateProcessing(**begun)
        about["chat_template"] = TEMPLATE
    BPETokenizer(inner).save(root / "model" / "tokenizer.json")
    (root / "model" / "tokenizer_config.json").write_text(json.dumps(about))
    rows = [
        {"question": "#$%" + "&'()*+"[i:], "choices": ["*+", ",-.", "/0"], "answer": i % 3, "text": "a"}
        for i in range(5)
    ]
    (root / "data.json").write_text("\n".join(map(json.dumps, rows)))
    for name, rest in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {root}/data.json}}}}\ntest_split: test\n"
        (root / f"{name}.yaml").write_text(f"task: {name}\n{data}{rest}")
    return root


def scores(model, place, tasks=tuple(TASKS), **options):
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(place), include_defaults=False),
        bootstrap_iters=0,
        random_seed=0,
        log_samples=True,
        apply_chat_template="chat_template" in (place / "model" / "tokenizer_config.json").read_text(),
        **options,
    )
    answers = {name: [sample["filtered_resps"] for sample in found["samples"][name]] for name in found["samples"]}
    numbers = {
        (name, metric): value
        for name, row in found["results"].items()
        for metric, value in row.items()
        if isinstance(value, float) and "stderr" not in metric
    }
    return numbers, answers


@pytest.fixture(scope="module")
def wanted(place):
    return scores("hf", place, model_args=f"pretrained={place}/model,dtype=float32,max_length=24", device="cpu")


def check(found, wanted, tasks=tuple(TASKS)):
    assert len(wanted[0]) == 5
    assert found[0] == pytest.approx({key: value for key, value in wanted[0].items() if key[0] in tasks}, abs=1e-4)
    for name in {"choices", "rolling"} & set(tasks):
        for mine, other in zip(found[1][name], wanted[1][name], strict=True):
            for one, two in zip(mine, other, strict=True):
                assert one == pytest.approx(two, abs=2e-4)
    assert found[1]["writing"] == wanted[1]["writing"]


def test_in_process_it_scores_as_transformers_does(place, wanted):
    engine, loaded = make_engine(SourceConfig(str(place / "model")), Plan(), ServeConfig(slots=2, length=25, chunk=16))
    check(scores(harness_model(engine, loaded), place), wanted)


def test_through_the_server_it_scores_as_transformers_does(place, wanted):
    engine, loaded = make_engine(SourceConfig(str(place / "model")), Plan(), ServeConfig(slots=2, length=32, chunk=16))
    service, config = Service(engine), AppConfig(model="tiny")
    # The client itself leaves out the beginning of a text whose perplexity it asks for.
    tasks = tuple(TASKS) if loaded.format.template == "" else ("choices", "writing")
    with socket.create_server(("127.0.0.1", 0)) as port:
        server = make_server(make_app(service, loaded.tokenizer, config, loaded.format), service, config, lambda: None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        where = f"base_url=http://127.0.0.1:{port.getsockname()[1]}/v1/completions"
        try:
            more = f"model=tiny,{where},tokenizer={place}/model,tokenizer_backend=huggingface,max_length=25"
            check(scores("local-completions", place, tasks, model_args=more), wanted, tasks)
        finally:
            server.should_exit = True
            thread.join(60)
