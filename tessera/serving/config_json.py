"""Hugging Face's config.json of a model, read and written by the tables of `tessera.serving.families`.

An entry is a field of `TransformerConfig` where `FIELDS` says so; the few that say the same in another way have a
function here. A model is written as the first family whose entries, read again, give the same model.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from moe.experts import MixtureConfig
from moe.layer import MoEConfig
from tessera.infra.config import ConfigError, build
from tessera.models.transformer import TransformerConfig
from tessera.serving import packed
from tessera.serving.families import (
    FAMILIES,
    FIELDS,
    LETTERS,
    NULL,
    NUMBERS,
    REFUSED,
    ROPE,
    ROPE_KINDS,
    ROPE_REQUIRED,
    SCORES,
    WHOLE,
    ZERO,
    Family,
    NotConvertible,
)

MOST_LAYERS = 10_000


def settings(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Entries of a config.json with the defaults of its family for what it leaves out.

    Raises:
      NotConvertible: see `tessera.serving.huggingface.read_settings`.
    """
    found = dict(found)
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise NotConvertible(f"{where}: model_type={kind!r} has no counterpart here; {', '.join(FAMILIES)} load")
    packed.scheme(found.get("quantization_config"), where)
    defaults = FAMILIES[kind].defaults
    for one, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if one in defaults and other in found:  # two names of one entry
            count = found.pop(other)
            if found.setdefault(one, count) != count:
                raise NotConvertible(f"{where}: {other}={count!r} and {one}={found[one]!r} differ")
    c = dict(defaults) | found
    if c.get("rope_parameters") is None:
        c["rope_parameters"] = defaults.get("rope_parameters")
    _check_types(c, defaults, where)
    rope = _rope(c, where)
    for name in (*WHOLE, *NUMBERS):
        if name in defaults and not (c[name] is None and (defaults[name] is None or name in NULL)):
            _check_number(where, name, c[name], whole=name in WHOLE, least=0 if name in ZERO else 1)
    if c["num_hidden_layers"] > MOST_LAYERS:  # settings of every layer are listed before a tensor is looked for
        raise NotConvertible(f"{where}: num_hidden_layers={c['num_hidden_layers']}: no model has over {MOST_LAYERS}")
    c["rope_parameters"] = rope
    if kind.startswith("qwen") and not c.get("use_sliding_window"):
        c["sliding_window"] = None  # the entry has no effect
    activation = "hidden_activation" if "hidden_activation" in defaults else "hidden_act"
    refused = {name: value for name, value in (REFUSED | SCORES.get(kind, {})).items() if name not in defaults}
    if activation == "hidden_activation":
        del refused["hidden_act"]  # the entry has no effect
    wrong = [
        f"{name}={c[name]!r}"
        for name, fine in (refused | {activation: defaults[activation]}).items()
        if c.get(name) not in (None, fine)
    ]
    known = {"rope_type", "rope_theta", "partial_rotary_factor", *ROPE_KINDS.get(rope["rope_type"], ())}
    kinds = ("default",) if kind == "phi3" else ROPE_KINDS  # transformers' Phi-3 scales by LongRoPE alone
    if rope["rope_type"] not in kinds or any(rope[name] is not None for name in rope.keys() - known):
        wrong.append(f"rotary positions {rope}")
    windowed = "layer_types" in defaults and c.get("sliding_window")
    if types := set(c.get("layer_types") or ()) - (LETTERS.keys() if windowed else {"full_attention"}):
        wrong.append(f"layer_types {sorted(types)}" + " without sliding_window" * (not windowed))
    if wrong:
        raise NotConvertible(f"{where}: {', '.join(wrong)}: no counterpart here; {kind} loads without")
    if missing := [name for name in ROPE_REQUIRED.get(rope["rope_type"], ()) if rope.get(name) is None]:
        raise NotConvertible(f"{where}: rotary positions of rope_type={rope['rope_type']!r} need {', '.join(missing)}")
    return c


def _check_types(c: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    for name, default in defaults.items():
        if isinstance(default, bool) and not (isinstance(c[name], bool) or (c[name] is None and name in NULL)):
            raise NotConvertible(f"{where}: {name}={c[name]!r} must be true or false")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(c.get(name) or {}, dict):
            raise NotConvertible(f"{where}: {name}={c[name]!r} must be an object")
    for name, kind in (("layer_types", str), ("no_rope_layers", int)):
        found = c.get(name)
        if found is not None and not (isinstance(found, list) and all(isinstance(one, kind) for one in found)):
            wrong = next((one for one in found if not isinstance(one, kind)), 0) if isinstance(found, list) else found
            must = "in rope_type or layer_types must be text" if kind is str else f"in {name} must be 0 or 1"
            raise NotConvertible(f"{where}: {wrong!r} {must}")
        if found is not None and name in defaults and len(found) != c["num_hidden_layers"]:
            raise NotConvertible(
                f"{where}: {name} has {len(found)} entries for num_hidden_layers={c['num_hidden_layers']}"
            )


def _rope(c: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary entries of all layers, of old and new names; those of local layers go to `rope_local_base_freq`."""
    two_sets = "rope_local_base_freq" in FAMILIES[c["model_type"]].defaults
    given, scaling = c.get("rope_parameters") or {}, c.get("rope_scaling") or {}
    sets = [given[name] or {} for name in ("full_attention", "sliding_attention") if name in given]
    if not all(isinstance(one, dict) for one in sets):
        raise NotConvertible(f"{where}: rope_parameters must hold objects")
    if given and bool(sets) != two_sets:
        must = "full_attention and sliding_attention" if two_sets else "one set for all layers"
        raise NotConvertible(f"{where}: rope_parameters {given}: {c['model_type']} has {must}")
    if two_sets:
        local = given.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise NotConvertible(f"{where}: rope_parameters of sliding_attention {local}: no counterpart here")
        c["rope_local_base_freq"] = local.get("rope_theta") or c["rope_local_base_freq"]
        given = (given.get("full_attention") or {}) | scaling
    else:
        given = scaling or given  # transformers reads the new name where the old one is empty
    rope = {"rope_type": given.get("type", "default"), **given}
    rope.pop("type", None)
    if not isinstance(rope["rope_type"], str):
        raise NotConvertible(f"{where}: {rope['rope_type']!r} in rope_type or layer_types must be text")
    if rope["rope_type"] in ("llama3", "yarn"):
        # transformers takes the entry beside the rotary ones before the one among them, but of one set alone.
        entry = "original_max_position_embeddings"
        beside = None if two_sets else c.get(entry)
        rope[entry] = beside or rope.get(entry) or c["max_position_embeddings"]
    c["rope_theta"] = rope.get("rope_theta") or c["rope_theta"]
    part = rope.get("partial_rotary_factor")
    c["partial_rotary_factor"] = c.get("partial_rotary_factor", 1.0) if part is None else part
    return rope


def _check_number(where: str, name: str, value: Any, *, whole: bool, least: int = 1) -> None:
    valid = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not (valid and (value >= least if whole else value > 0) and value < 2**31):
        kind = "whole number" if whole else "number"
        raise NotConvertible(f"{where}: {name}={value!r} must be a {kind} above {least - 1} and below 2^31")


def read(c: Mapping[str, Any], where: str) -> TransformerConfig:
    """The model that `settings` describes."""
    kind = c["model_type"]
    family = FAMILIES[kind]
    entries = {name: c[name] for name in family.defaults}  # what others have of config.json changes nothing
    tree: dict[str, Any] = {}
    for name, field in FIELDS.items():
        if name in entries:
            _put(tree, field, 0 if entries[name] is None else entries[name])
    _merge(tree, family.fields)
    if not tree["kv_heads"]:
        tree["kv_heads"] = tree["heads"]
    if "head_dim" in entries and not tree["head_dim"]:
        tree["head_dim"] = tree["width"] // tree["heads"]
    if "attention_bias" in entries:
        tree |= {"qkv_bias": bool(entries["attention_bias"]), "output_bias": bool(entries["attention_bias"])}
    if "partial_rotary_factor" in entries and entries["partial_rotary_factor"] != 1:
        tree["rotary_dim"] = int(tree["head_dim"] * entries["partial_rotary_factor"])
    if family.fields.get("gain_offset"):
        tree["embed_scale"] = float(tree["width"]) ** 0.5
    tree |= {"rope_theta": float(c["rope_theta"]), "rope_scaling": _rope_scaling(c)}
    tree |= _pattern(entries, family, tree)
    if tree.get("mlp") == "routed":
        _put_experts(tree["moe"], entries, kind)
    try:
        return canonical(build(TransformerConfig, tree, where))
    except ConfigError as error:
        raise NotConvertible(str(error)) from error


def _rope_scaling(c: Mapping[str, Any]) -> dict[str, Any]:
    rope = c["rope_parameters"]
    if rope["rope_type"] == "default":
        return {}
    found = {ROPE[name]: rope[name] for name in ROPE_KINDS[rope["rope_type"]] if rope.get(name) is not None}
    return {"kind": rope["rope_type"], **found}


def _pattern(entries: Mapping[str, Any], family: Family, tree: Mapping[str, Any]) -> dict[str, Any]:
    """`window` and `attention_pattern` of a model, from its list of layers or by its family's rule."""
    layers, window = tree["layers"], tree.get("window", 0)
    if "no_rope_layer_interval" in entries:
        every = entries["no_rope_layer_interval"]
        rotated = entries["no_rope_layers"] or [(i + 1) % every for i in range(layers)]
        return {"attention_pattern": "".join("G" if one else "N" for one in rotated)}
    if not window:
        return {}
    letters = family.letters or "L"
    if "sliding_window_pattern" in entries:
        letters = "L" * (entries["sliding_window_pattern"] - 1) + "G"
    if "max_window_layers" in entries:
        letters = "G" * min(entries["max_window_layers"], layers) + "L" * layers
    if entries.get("layer_types"):
        letters = "".join(LETTERS[one] for one in entries["layer_types"])
    found = (letters * layers)[:layers]
    return {"attention_pattern": found} if "L" in found else {"window": 0}


def _put_experts(moe: dict[str, Any], entries: Mapping[str, Any], kind: str) -> None:
    router = moe.setdefault("router", {})
    if kind == "deepseek_v2":
        # Its router does not divide by the sum of the chosen, whatever `norm_topk_prob` says.
        grouped = entries["topk_method"] == "group_limited_greedy"
        if not grouped and entries["topk_method"] != "greedy":
            raise NotConvertible(
                f"config.json: topk_method={entries['topk_method']!r}: 'greedy' or group_limited_greedy"
            )
        router |= {"name": "softmax_groups"} if grouped else {"softmax": "before", "groups": 1, "top_groups": 1}
    elif kind == "deepseek_v3":
        router["normalize"] = 1.0 if entries["norm_topk_prob"] else 0.0
    else:
        # A softmax over the chosen experts is one over all, divided by the sum of the chosen.
        router["softmax"] = "after" if entries.get("norm_topk_prob", True) else "before"
    if "shared_expert_intermediate_size" in entries:
        shared, rest = divmod(entries["shared_expert_intermediate_size"], moe["ff"])
        if rest:
            raise NotConvertible(
                f"shared_expert_intermediate_size={entries['shared_expert_intermediate_size']} is no multiple of "
                f"moe_intermediate_size={moe['ff']}"
            )
        moe |= {"shared": shared, "shared_gate": shared > 0}
    if "decoder_sparse_step" in entries:
        moe["first_k_dense_replace"], moe["every"] = _dense_layers(entries)


def _dense_layers(entries: Mapping[str, Any]) -> tuple[int, int]:
    """`MoEConfig.first_k_dense_replace` and `every` of a family's layers without experts.

    Raises:
      NotConvertible: other layers than the first ones and all but every n-th.
    """
    step, dense = entries.get("decoder_sparse_step", 1), entries.get("mlp_only_layers") or []
    whole = isinstance(dense, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in dense)
    if not whole or isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise NotConvertible(f"config.json: decoder_sparse_step={step!r}, mlp_only_layers={dense!r}: numbers of layers")
    # Of the layers that would have experts, every step-th, those that have none.
    without = sorted({one for one in dense if (one + 1) % step == 0 and 0 <= one < entries["num_hidden_layers"]})
    if without != [step * (i + 1) - 1 for i in range(len(without))]:
        raise NotConvertible(
            f"config.json: mlp_only_layers={dense!r} with decoder_sparse_step={step}: only the first layers can be "
            "dense besides all but every n-th"
        )
    return step * len(without), step


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _merge(tree: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, Mapping):
            _merge(tree.setdefault(name, {}), value)
        else:
            tree[name] = value


def canonical(config: TransformerConfig) -> TransformerConfig:
    """The same model with defaults filled in and without what says nothing about its function."""
    kinds = config.attention_kinds
    shortest = next(n for n in range(1, len(kinds) + 1) if kinds == (kinds[:n] * len(kinds))[: len(kinds)])
    pattern = kinds[:shortest]
    local, plain = (config.local_rope_theta, "none"), (config.rope_theta, config.rope_scaling.kind)
    changes: dict[str, Any] = {
        "kv_heads": config.kv_size,
        "head_dim": 0 if config.latent.kv_rank else config.head_size,
        "ff": config.ff_size,
        "latent": replace(config.latent, absorbed=False),
        "attention_pattern": "" if pattern in ("L", "G") else pattern,
        "rotary_dim": 0 if config.rotary_dim == config.head_size else config.rotary_dim,
        "local_rope_theta": config.local_rope_theta if "L" in kinds and local != plain else 0.0,
        "moe": MoEConfig(),
        **dict.fromkeys(("dtype", "remat", "scan", "init_scale"), None),
    }
    base = TransformerConfig(1, 1, 2, 1)
    changes |= {name: getattr(base, name) for name, value in changes.items() if value is None}
    if config.mlp == "routed":
        moe = config.moe
        width, dense = moe.width_of(config.ff_size), len(set(config.mlps)) > 1
        changes["ff"] = config.ff_size if dense else width
        router = replace(moe.router, jitter=0.0, capacity_factor=2.0, slots=1)
        mixture = MixtureConfig(activation=moe.mixture.activation, gating=moe.mixture.gating, weigh=moe.mixture.weigh)
        if moe.mixture.dispatch == "capacity":
            mixture = replace(mixture, dispatch="capacity")
        changes["moe"] = MoEConfig(
            every=moe.every,
            first_k_dense_replace=moe.first_k_dense_replace,
            ff=width if dense or width != changes["ff"] else 0,
            router=router,
            mixture=mixture,
            **{name: getattr(moe, name) for name in ("shared", "shared_gate", "identity", "null", "biases", "latent")},
        )
    return replace(config, **changes)


def write(config: TransformerConfig) -> dict[str, Any]:
    """What config.json says of a model: that of the first family whose entries describe it.

    Raises:
      NotConvertible: a model of none of the `FAMILIES`; names the fields in which the nearest differs.
    """
    wanted = canonical(config)
    nearest: tuple[str, list[str]] | None = None
    for kind in FAMILIES:
        entries = _entries(kind, wanted)
        try:
            found = read(settings(entries, kind), kind)
        except (NotConvertible, ValueError, TypeError):  # sizes that this family cannot have
            continue
        different = list(_differences(asdict(wanted), asdict(found)))
        if not different:
            return entries
        if nearest is None or len(different) < len(nearest[1]):
            nearest = kind, different
    if nearest is None:
        raise NotConvertible("no family of Hugging Face has a model of these sizes")
    raise NotConvertible(
        f"no family of Hugging Face has this model; the nearest, {nearest[0]}, differs in {', '.join(nearest[1])}"
    )


def family_of(config: TransformerConfig) -> Family:
    """The family that a model is written as."""
    return FAMILIES[write(config)["model_type"]]


def _entries(kind: str, config: TransformerConfig) -> dict[str, Any]:
    family = FAMILIES[kind]
    name = family.architecture or "".join(part.capitalize() for part in kind.split("_"))
    entries: dict[str, Any] = {"architectures": [f"{name}ForCausalLM"], "model_type": kind}
    for entry, default in family.defaults.items():
        if entry in FIELDS:
            value = _get(config, FIELDS[entry])
            empty = not value and not isinstance(value, bool) and entry not in ZERO
            entries[entry] = None if empty and entry != "num_key_value_heads" else value
        elif entry in WRITERS:
            if (value := WRITERS[entry](config)) is not OMIT:
                entries[entry] = value
        elif entry not in ("rope_parameters", "max_position_embeddings"):
            entries[entry] = default
    if config.mlp == "routed" and "moe_intermediate_size" not in family.defaults:
        entries["intermediate_size"] = config.moe.width_of(config.ff_size)
    if "moe_intermediate_size" in family.defaults and config.mlp == "routed":
        entries["moe_intermediate_size"] = config.moe.width_of(config.ff_size)
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling.kind != "none":
        fields = {name: getattr(scaling, ROPE[name]) for name in ROPE_KINDS[scaling.kind]}
        unsaid = {"truncate": True}
        rope |= {"rope_type": scaling.kind}
        rope |= {
            name: value for name, value in fields.items() if value not in (unsaid.get(name), 0.0) or value is False
        }
    if "partial_rotary_factor" in family.defaults:
        rope["partial_rotary_factor"] = entries["partial_rotary_factor"]
    entries["rope_parameters"] = rope
    if "rope_local_base_freq" in family.defaults:  # one set of entries for either kind of layer
        theta = entries.pop("rope_local_base_freq") or entries.pop("rope_theta")
        local = {"rope_type": "default", "rope_theta": theta}
        entries["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    return entries


OMIT = object()
WRITERS: dict[str, Callable[[TransformerConfig], Any]] = {
    "rope_theta": lambda config: config.rope_theta,
    "attention_bias": lambda config: config.qkv_bias,
    "use_sliding_window": lambda config: config.window > 0,
    "max_window_layers": lambda config: OMIT,
    "sliding_window_pattern": lambda config: OMIT,
    "layer_types": lambda config: [
        next(name for name, one in LETTERS.items() if one == ("L" if letter == "L" else "G"))
        for letter in config.attention_kinds
    ],
    "no_rope_layers": lambda config: [int(letter != "N") for letter in config.attention_kinds],
    "no_rope_layer_interval": lambda config: OMIT,
    "partial_rotary_factor": lambda config: config.rotary_dim / config.head_size if config.rotary_dim else 1.0,
    "norm_topk_prob": lambda config: (
        config.moe.router.normalize == 1
        if config.moe.router.name == "sigmoid"
        else config.moe.router.softmax == "after"
    ),
    "shared_expert_intermediate_size": lambda config: config.moe.shared * config.moe.width_of(config.ff_size),
    "decoder_sparse_step": lambda config: config.moe.every if len(set(config.mlps)) > 1 else OMIT,
    "mlp_only_layers": lambda config: list(range(config.first_dense)) if len(set(config.mlps)) > 1 else OMIT,
    "topk_method": lambda config: "group_limited_greedy" if config.moe.router.name == "softmax_groups" else "greedy",
    "num_nextn_predict_layers": lambda config: 0,
}


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, value in one.items():
        if isinstance(value, Mapping):
            yield from _differences(value, other[name], f"{path}{name}.")
        elif value != other[name]:
            yield f"{path}{name}={value!r}"
