"""Llama- and Mixtral-shaped Hugging Face directories: config.json and safetensors, in and out, a tensor at a time.

Hugging Face stores a projection as [outputs, inputs], one tensor per layer (and expert); here it is [inputs, outputs]
and stacked. Rotary channels are paired alike (i with i + h / 2).
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import PyTree

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from tessera.infra.logger import write_text
from tessera.models.transformer import TransformerConfig, param_shapes

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|\d{5}\.part")
MARK = {"written_by": "tessera"}  # in every file of an export: nothing without it is replaced or removed
STAGING = ".tessera-export"  # folder inside the directory that the files are written to before they are moved

# Our path without the layer axis -> Hugging Face's name; {l} and {e} count layers and experts.
SHARED = {
    "embed/table": "model.embed_tokens.weight",
    "final_norm/gain": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
BLOCK = {
    "attention_norm/gain": "model.layers.{l}.input_layernorm.weight",
    "mlp_norm/gain": "model.layers.{l}.post_attention_layernorm.weight",
    "attention/query/kernel": "model.layers.{l}.self_attn.q_proj.weight",
    "attention/key/kernel": "model.layers.{l}.self_attn.k_proj.weight",
    "attention/value/kernel": "model.layers.{l}.self_attn.v_proj.weight",
    "attention/output/kernel": "model.layers.{l}.self_attn.o_proj.weight",
    "mlp/gate/kernel": "model.layers.{l}.mlp.gate_proj.weight",
    "mlp/up/kernel": "model.layers.{l}.mlp.up_proj.weight",
    "mlp/down/kernel": "model.layers.{l}.mlp.down_proj.weight",
    "mlp/router/kernel": "model.layers.{l}.block_sparse_moe.gate.weight",
    "mlp/experts/gate/kernel": "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight",
    "mlp/experts/up/kernel": "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight",
    "mlp/experts/down/kernel": "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight",
}


class NotConvertible(ValueError):
    """A model that Hugging Face's format cannot describe."""


class ForeignFiles(FileExistsError):
    """A directory that holds files which no export has written."""


def read_config(directory: Path | str) -> TransformerConfig:
    """The model that a directory's config.json describes.

    Raises:
      FileNotFoundError: no config.json.
      NotConvertible: neither Llama nor Mixtral, or with biases, scaled rotary positions, a sliding window or another
        activation.
    """
    path = Path(directory) / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"no Hugging Face model in {directory}: config.json is missing")
    c = json.loads(path.read_text(encoding="utf-8"))
    kind = c.get("model_type")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    wrong = {
        f"model_type={kind!r}": kind not in ("llama", "mixtral"),
        "attention_bias": c.get("attention_bias"),
        "mlp_bias": c.get("mlp_bias"),
        "sliding_window": c.get("sliding_window"),
        f"hidden_act={c.get('hidden_act')!r}": c.get("hidden_act", "silu") != "silu",
        f"rotary positions {rope}": rope.get("rope_type", rope.get("type", "default")) != "default",
    }
    for what, refused in wrong.items():
        if refused:
            raise NotConvertible(f"{path}: {what} has no counterpart here; Llama and Mixtral without it load")
    moe: dict[str, Any] = {}
    if kind == "mixtral":
        router = RouterConfig("top_k", c["num_local_experts"], c["num_experts_per_tok"])
        moe = {"mlp": "routed", "moe": MoEConfig(router=router)}
    return TransformerConfig(
        vocab_size=c["vocab_size"],
        layers=c["num_hidden_layers"],
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        ff=c["intermediate_size"],
        rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 1e4),
        norm_eps=c["rms_norm_eps"],
        tied=bool(c.get("tie_word_embeddings", False)),
        **moe,
    )


def write_config(config: TransformerConfig, **more: Any) -> dict[str, Any]:
    """What config.json says of a model; `more` is added.

    Raises:
      NotConvertible: a model that is neither Llama nor Mixtral.
    """
    routed = config.mlp == "routed"
    moe, router = config.moe, config.moe.router
    plain = moe.every == 1 and not moe.shared and not moe.biases and moe.mixture.activation == "swiglu"
    weights = router.name == "top_k" and router.softmax == "after" and router.scale == 1
    if routed and not (plain and weights and moe.mixture.dispatch != "capacity"):
        raise NotConvertible(
            "Mixtral has SwiGLU experts in every layer, weighted by a softmax over the chosen ones, without shared "
            "experts, biases or capacity; this model's moe differs"
        )
    kind = "mixtral" if routed else "llama"
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    values = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_size,
        "head_dim": config.head_size,
        "intermediate_size": moe.width_of(config.ff_size) if routed else config.ff_size,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }
    if routed:
        values |= {"num_local_experts": router.experts, "num_experts_per_tok": router.k, "sliding_window": None}
    else:
        values |= {"attention_bias": False, "mlp_bias": False}
    return values | more


def load_directory(
    directory: Path | str, place: Callable[[str, np.ndarray], Any] | None = None
) -> tuple[PyTree, TransformerConfig]:
    """Parameters float32 and model of a directory; tensors are read one at a time, a stack is filled as they come.

    Args:
      directory: config.json and *.safetensors.
      place: (path, array) -> what the tree holds, to put every finished leaf where it belongs; default numpy.

    Raises:
      FileNotFoundError: no config or no safetensors.
      NotConvertible: another architecture, or tensors missing or of other shapes.
      ImportError: the extra `hf` is not installed.
    """
    config = read_config(directory)
    read = _reader(Path(directory))
    tree: dict[str, Any] = {}
    for path, shape in _leaves(config):
        array = np.empty(shape, np.float32)
        for index, name in _names(path, config):
            array[index] = _inward(read(name), array[index].shape, path, name)
        _set(tree, path, array if place is None else place(path, array))
    return tree, config


def save_directory(
    directory: Path | str,
    params: PyTree,
    config: TransformerConfig,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    **more: Any,
) -> Path:
    """Write a decoder as a Hugging Face directory; it loads as the old model, the new one, or (killed) as none.

    Only files that an export has written are replaced or removed, those of an export by an earlier version not.

    Args:
      directory: new, empty, or of an earlier export, which is replaced.
      params: of a scanned decoder of `config`; a leaf is fetched from its devices when its turn comes.
      config: the model.
      dtype: "float32" or "bfloat16".
      shard_bytes: most bytes of a file (a single larger tensor gets its own).
      more: further entries of config.json.

    Raises:
      ForeignFiles: the directory holds anything else; nothing in it is touched.
      NotConvertible: a model that is neither Llama nor Mixtral.
      ImportError: the extra `hf` is not installed.
    """
    save_file = _safetensors().numpy.save_file
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    settings = write_config(config, dtype=dtype, **more) | MARK
    path = Path(directory)
    _refuse_foreign(path)
    staging = path / STAGING
    _clear_staging(staging)  # a killed export left it
    staging.mkdir(parents=True)
    files: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        if held:
            save_file(held, staging / f"{len(files):05}.part", {"format": "pt"} | MARK)
            files.append(list(held))
            held.clear()

    try:
        for name, tensor in _outward(params, config, kind):
            if held and sum(x.nbytes for x in held.values()) + tensor.nbytes > shard_bytes:
                flush()
            held[name] = tensor
            total += tensor.nbytes
        flush()
        where: dict[str, str] = {}
        for i, names in enumerate(files):
            file = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
            os.replace(staging / f"{i:05}.part", staging / file)
            where |= dict.fromkeys(names, file)
        if len(files) > 1:
            index = {"metadata": {"total_size": total} | MARK, "weight_map": where}
            write_text(staging / INDEX, json.dumps(index, indent=2))
        write_text(staging / CONFIG, json.dumps(settings, indent=2) + "\n")
        _refuse_foreign(path)  # writing took a while
        _move_in(staging, path)
    finally:
        _clear_staging(staging)
    return path


def _move_in(staging: Path, path: Path) -> None:
    """Replace an earlier export; without its config.json, gone first and written last, the directory is no model."""
    for name in (CONFIG, INDEX, *sorted(file.name for file in path.iterdir() if WEIGHTS.fullmatch(file.name))):
        (path / name).unlink(missing_ok=True)
    for name in (*sorted(file.name for file in staging.iterdir() if WEIGHTS.fullmatch(file.name)), INDEX, CONFIG):
        if (staging / name).exists():
            os.replace(staging / name, path / name)


def _refuse_foreign(path: Path) -> None:
    """Raise ForeignFiles if a directory holds anything but an export."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ForeignFiles(f"{path} is a file; name a new or empty directory to export to")
    foreign = sorted(
        file.name for file in path.iterdir() if not (_is_staging(file) if file.name == STAGING else _is_exported(file))
    )
    if foreign:
        shown = ", ".join(foreign[:10]) + (f" and {len(foreign) - 10} more" if len(foreign) > 10 else "")
        raise ForeignFiles(
            f"{path} holds files that no export has written: {shown}; export to a new or empty directory, or move "
            "these files away first"
        )


def _is_exported(file: Path) -> bool:
    """Whether an export has written a file: by its name and by the mark inside."""
    if file.is_symlink() or not file.is_file():
        return False
    try:
        if file.name in (CONFIG, INDEX):
            found = json.loads(file.read_text(encoding="utf-8"))
            return MARK.items() <= (found if file.name == CONFIG else found["metadata"]).items()
        if WEIGHTS.fullmatch(file.name):
            with _safetensors().safe_open(file, framework="numpy") as tensors:
                return MARK.items() <= (tensors.metadata() or {}).items()
    except Exception as error:  # what cannot be read is not known to be an export's
        if isinstance(error, ImportError):
            raise
    return False


def _is_staging(folder: Path) -> bool:
    """Whether a folder is that of an export under way, or killed: by its name and those of its files."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(
        file.is_file() and re.fullmatch(rf"{WEIGHTS.pattern}|\.?({CONFIG}|{INDEX})(\.\d+)?", file.name)
        for file in folder.iterdir()
    )


def _clear_staging(folder: Path) -> None:
    if folder.exists() and _is_staging(folder):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def _leaves(config: TransformerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path, leaf in jax.tree.leaves_with_path(param_shapes(config)):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape


def _names(path: str, config: TransformerConfig) -> Iterator[tuple[tuple[int, ...], str]]:
    """(index into our array, Hugging Face's name) of every tensor that makes up a leaf."""
    if path in SHARED:
        yield (), SHARED[path]
        return
    pattern = BLOCK[path.removeprefix("blocks/")]
    for layer in range(config.layers):
        if "{e}" not in pattern:
            yield (layer,), pattern.format(l=layer)
            continue
        for expert in range(config.moe.router.experts):
            yield (layer, expert), pattern.format(l=layer, e=expert)


def _inward(tensor: np.ndarray, shape: tuple[int, ...], path: str, name: str) -> np.ndarray:
    turned = tensor.T if path.endswith("kernel") else tensor
    if turned.size != np.prod(shape):
        raise NotConvertible(f"{name} has shape {tensor.shape}; {path} needs {shape}")
    return np.asarray(turned, np.float32).reshape(shape)


def _outward(params: PyTree, config: TransformerConfig, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(params)
    }
    for path, shape in _leaves(config):
        leaf = leaves.get(path)
        if leaf is None or tuple(leaf.shape) != shape:
            raise NotConvertible(f"{path} should have shape {shape}; export takes scanned blocks, unquantised")
        for index, name in _names(path, config):
            array = np.asarray(jnp.asarray(leaf[index] if index else leaf, jnp.float32))
            if path.endswith("kernel"):
                outputs = array.shape[-1] if re.search("output/kernel$", path) else int(np.prod(array.shape[1:]))
                array = array.reshape(-1, outputs).T
            yield name, np.ascontiguousarray(array.astype(dtype))


def _reader(directory: Path) -> Callable[[str], np.ndarray]:
    """name -> tensor, from whichever file has it."""
    safe_open = _safetensors().safe_open
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {directory}")
    handles = [safe_open(file, framework="numpy") for file in files]
    where = {name: handle for handle in handles for name in handle.keys()}

    def read(name: str) -> np.ndarray:
        if name not in where:
            raise NotConvertible(f"{directory} has no tensor {name}")
        return where[name].get_tensor(name)

    return read


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("Hugging Face directories need the extra `hf`: pip install 'tessera-jax[hf]'") from error
    return safetensors


def is_directory(path: Path | str) -> bool:
    """Whether a directory looks like Hugging Face's rather than a run's."""
    file = Path(path) / CONFIG
    return file.exists() and "model_type" in json.loads(file.read_text(encoding="utf-8"))
