"""Hugging Face directories of the families in `tessera.serving.families`: config.json and safetensors, in and out.

Tensors are read and written one at a time. Hugging Face stores a projection as [outputs, inputs], one tensor per layer
(and expert); here it is [inputs, outputs] and stacked. Rotary channels are paired alike (i with i + h / 2).
"""

import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import logging
from jaxtyping import PyTree

from tessera.data import special_tokens
from tessera.infra.logger import read_object, write_text
from tessera.models.transformer import TransformerConfig, param_shapes
from tessera.serving import packed
from tessera.serving.config_json import family_of, read, settings, write
from tessera.serving.families import FAMILIES, SHARED, Family, NotConvertible, stored

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|\d{5}\.part")
SUMS = "crc32"  # in the metadata of an export's files: the CRC-32 of every tensor's bytes
MARK = {"written_by": "tessera"}  # in every file of an export: nothing without it is replaced or removed
STAGING = ".tessera-export"  # folder inside the directory that the files are written to before they are moved

DTYPES = ("F64", "F32", "F16", "BF16")
# Buffers that earlier versions of transformers saved; they follow from the config.
IGNORED = re.compile(r"(.+\.)?rotary_emb\.inv_freq")


class ForeignFiles(FileExistsError):
    """A directory that holds files which no export has written."""


def read_settings(directory: Path | str) -> dict[str, Any]:
    """A directory's config.json with the defaults of its family for what it leaves out.

    Raises:
      FileNotFoundError: no config.json.
      NotConvertible: not one of `FAMILIES`, or with an entry that changes what the model computes and has no
        counterpart here: other biases, rotary scaling, activation or windows, quantized weights of another layout
        than `tessera.serving.packed` reads, layers without experts between routed ones; or sizes that are none.
      ValueError: a damaged config.json.
    """
    path = Path(directory) / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"no Hugging Face model in {directory}: config.json is missing")
    return settings(read_object(path), str(path))


class TextFormat(NamedTuple):
    """What a model takes for a text.

    Attributes:
      begin: token that begins it, None without one.
      ends: tokens that end it.
      template: of a chat, in Jinja; "" without one.
      positions: tokens at most; 0 for no limit.
      special: texts of special tokens by the names that a template knows them by (bos_token, eos_token ...); None for
        those of `begin` and `ends`.
    """

    begin: int | None = None
    ends: tuple[int, ...] = ()
    template: str = ""
    positions: int = 0
    special: Mapping[str, str] | None = None


# Classes of tokenizers that have no special tokens but those that their files name.
NO_DEFAULTS = (None, "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")


def read_format(directory: Path | str) -> TextFormat:
    """Read the special tokens, chat template and positions of a directory."""
    path, c = Path(directory), read_settings(directory)
    more = {name: _read_json(path / name) for name in ("generation_config.json", "tokenizer_config.json")}
    ends: dict[int, None] = {}
    for name, found in ((CONFIG, c), ("generation_config.json", more["generation_config.json"])):
        value = found.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(one) is int for one in (*ids, found.get("bos_token_id") or 0)):
            begin = found.get("bos_token_id")
            raise NotConvertible(f"{path / name}: eos_token_id={value!r}, bos_token_id={begin!r}: no token ids")
        if outside := [one for one in ids if not 0 <= one < c["vocab_size"]]:
            raise NotConvertible(
                f"{path / name}: eos_token_id={outside[0]}: a vocabulary of {c['vocab_size']} has tokens 0 to "
                f"{c['vocab_size'] - 1}"
            )
        ends |= dict.fromkeys(ids)
    file = path / "chat_template.jinja"
    try:
        template = file.read_text(encoding="utf-8") if file.exists() else None
    except UnicodeDecodeError as error:
        raise NotConvertible(f"{file} is not UTF-8 text: {error}") from error
    template = more["tokenizer_config.json"].get("chat_template") if template is None else template
    if isinstance(template, list):  # several by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    template = template if isinstance(template, str) else ""
    special = _special_tokens(path)
    return TextFormat(c.get("bos_token_id"), tuple(ends), template, c["max_position_embeddings"], special)


def _special_tokens(directory: Path) -> dict[str, str] | None:
    """Special tokens that a directory's tokenizer has for a template, as transformers reads them; None if unsaid."""
    settings = special_tokens.read_settings(directory)
    said = {name: settings[name] for name in special_tokens.NAMES if name in settings}
    if not said and (settings.get("tokenizer_class") not in NO_DEFAULTS or not settings):
        return None
    texts = {name: special_tokens.text_of(one) for name, one in said.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _read_json(file: Path) -> dict[str, Any]:
    return read_object(file) if file.exists() else {}


def read_config(directory: Path | str) -> TransformerConfig:
    """The model that a directory's config.json describes; raises what `read_settings` does."""
    try:
        return read(read_settings(directory), f"{directory}/{CONFIG}")
    except NotConvertible:
        raise
    except (ValueError, TypeError) as error:  # sizes that do not go together, entries of another type
        raise NotConvertible(f"{directory}/{CONFIG}: {error}") from error


def write_config(config: TransformerConfig, **more: Any) -> dict[str, Any]:
    """What config.json says of a model; `more` is added.

    Raises:
      NotConvertible: a model of none of the `FAMILIES`.
    """
    return write(config) | more


def load_directory(
    directory: Path | str, place: Callable[[str, np.ndarray], Any] | None = None
) -> tuple[PyTree, TransformerConfig]:
    """Parameters and model of a directory; tensors are read one at a time, a stack is filled as they come.

    Kernels that GPTQ, AWQ or compressed-tensors has quantized to 4 or 8 bits are `Quantized`, all else is float32.

    Args:
      directory: config.json and *.safetensors.
      place: (path, array) -> what the tree holds, to put every finished leaf where it belongs; default numpy.

    Raises:
      FileNotFoundError: no config or no safetensors.
      NotConvertible: another architecture; tensors missing, of other shapes, quantized, damaged, or that no parameter
        asks for.
      ImportError: the extra `hf` is not installed.
    """
    config, c = read_config(directory), read_settings(directory)
    family, tensors = FAMILIES[c["model_type"]], _open(Path(directory))
    read, quantized = _reader(Path(directory), tensors), {}
    if how := packed.scheme(c.get("quantization_config"), str(directory)):
        if how.activations:
            logging.warning("%s: its weights are read as quantized; activations are not quantized here", directory)
        slices = {name: file.handle.get_slice(name) for name, file in tensors.items()}
        kinds = {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
        quantized = packed.find(how, kinds, read, str(directory))
    _check_names(Path(directory), tensors, config, family, _more_layers(c), quantized)

    def unpacked(name: str) -> Any:
        if not how or name not in quantized:
            return read(name)
        try:
            return packed.read(how, quantized[name], read)
        except NotConvertible as error:
            raise NotConvertible(f"{directory}: {error}") from error

    whole = {name for name, module in quantized.items() if not module.float8}
    return assemble(config, unpacked, place, family, whole), config


def _bytes(tensor: np.ndarray) -> memoryview:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def _reader(directory: Path, tensors: dict[str, Any]) -> Callable[[str], np.ndarray]:
    """Reads a tensor by name and compares it with the CRC-32 that `save_directory` wrote, where there is one."""
    sums: dict[int, Any] = {}

    def read(name: str) -> np.ndarray:
        file, tensor = tensors[name], tensors[name].get_tensor(name)
        if id(file) not in sums:
            sums[id(file)] = read_sums(file)
        if sums[id(file)].get(name, found := zlib.crc32(_bytes(tensor))) != found:
            raise NotConvertible(f"{directory} is damaged: the checksum of {name} differs from the one written with it")
        return tensor

    def read_sums(file: Any) -> dict[str, int]:
        try:
            found = json.loads((file.handle.metadata() or {}).get(SUMS, "{}"))
            return {str(name): int(value) for name, value in found.items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise NotConvertible(f"{directory} is damaged: {SUMS} of a file are no numbers by tensor") from error

    return read


def assemble(
    config: TransformerConfig,
    read: Callable[[str], Any],
    place: Callable[[str, Any], Any] | None = None,
    family: Family = FAMILIES["llama"],
    quantized: Collection[str] = (),
) -> PyTree:
    """Parameters float32 of a scanned decoder from tensors in a family's names and layout, read one at a time.

    Those of the names in `quantized` are read as `packed.Packed`, and kernels of blocks made `Quantized` of them.

    Raises:
      NotConvertible: a tensor of another shape.
    """
    tree: dict[str, Any] = {}
    shapes, made_of = dict(_leaves(config)), defaultdict(list)
    for tensor in tensors_of(config, family):
        for number, path in enumerate(tensor.parts):
            made_of[path].append((tensor, number))
    for path, shape in shapes.items():
        kernel = None
        if all(tensor.name in quantized for tensor, _ in made_of[path]):
            kernel = _quantized_kernel(config, read, family, path, shapes, made_of[path])
        if kernel is not None:
            _set(tree, path, kernel if place is None else place(path, kernel))
            continue
        array = np.empty(shape, np.float32)
        for tensor, number in made_of[path]:
            found, parts = read(tensor.name), tensor.shapes(shapes)
            found = found.widen() if isinstance(found, packed.Packed) else found
            _check_shape(tensor.name, found.shape, file_shape(parts, tensor.layout))
            one = inward(cut(found, parts, number, tensor.layout), path, tensor.layout, array[tensor.place].shape)
            array[tensor.place] = halves(one, config.latent.rope_dim) if path.endswith(family.pairs) else one
        _set(tree, path, array if place is None else place(path, array))
    return tree


def _quantized_kernel(
    config: TransformerConfig,
    read: Callable[[str], Any],
    family: Family,
    path: str,
    shapes: Mapping[str, tuple[int, ...]],
    made_of: Sequence[tuple["Tensor", int]],
) -> Any:
    """A leaf of the blocks as `Quantized`; None for what the model reads in float32 or the file stores otherwise."""
    tensor = made_of[0][0]
    if not (tensor.place and path.endswith("/kernel") and tensor.layout == "rows") or path.endswith("router/kernel"):
        return None
    members = []
    for tensor, number in made_of:
        ends = np.cumsum([0, *(one[0] for one in tensor.shapes(shapes))])
        members.append(packed.rows(read(tensor.name), int(ends[number]), int(ends[number + 1])))
    lead = len(tensor.place)
    shape, pairs = shapes[path][lead:], path.endswith(family.pairs)
    inputs = len(shape) - 1 if path.endswith("output/kernel") else 1
    made = packed.kernel(
        members, shape, inputs, lambda array: halves(array, config.latent.rope_dim) if pairs else array
    )
    order = sorted(range(len(made_of)), key=lambda i: made_of[i][0].place)
    stack = shapes[path][:lead]
    return made and jax.tree.map(lambda array: array[order].reshape(*stack, *array.shape[1:]), made)


def tensor_names(config: TransformerConfig) -> set[str]:
    """Names of all tensors of a Llama."""
    return {tensor.name for tensor in tensors_of(config, FAMILIES["llama"])}


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
      NotConvertible: a model of none of the `FAMILIES`.
      ImportError: the extra `hf` is not installed.
    """
    save_file = safetensors_module().numpy.save_file
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
            sums = json.dumps({name: zlib.crc32(_bytes(tensor)) for name, tensor in held.items()})
            save_file(held, staging / f"{len(files):05}.part", {"format": "pt", SUMS: sums} | MARK)
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
        raise ForeignFiles(
            f"{path} holds files that no export has written: {some(foreign, 10)}; export to a new or empty directory, "
            "or move these files away first"
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
            with safetensors_module().safe_open(file, framework="numpy") as tensors:
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


AXES = {"rows": 0, "heads": 1, "turns": -1, "plain": 0}
"""The axis along which the parts of a tensor are joined, by layout."""


def outward_shape(path: str, shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Shape of one layer's leaf by `outward`."""
    if layout == "heads":
        return (*shape[1:], shape[0])
    if layout == "turns":
        return (*shape, 1)
    size = int(np.prod(shape))
    if layout == "plain" or path.endswith("table"):
        return shape
    if not path.endswith("kernel"):
        return (size,)
    outputs = shape[-1] if path.endswith("output/kernel") else size // shape[0]
    return outputs, size // outputs


def outward(array: np.ndarray, path: str, layout: str) -> np.ndarray:
    """One layer's leaf in Hugging Face's order, to be joined with others along `AXES`."""
    if layout == "heads":
        return array.transpose(1, 2, 0)
    shape = outward_shape(path, array.shape, layout)
    turned = layout == "rows" and path.endswith("kernel")
    return array.reshape(shape[::-1]).T if turned else array.reshape(shape)


def inward(array: np.ndarray, path: str, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    """Undo `outward`: a leaf of `shape`."""
    if layout == "heads":
        return array.transpose(2, 0, 1)
    return np.asarray(array.T if layout == "rows" and path.endswith("kernel") else array, np.float32).reshape(shape)


def joined_shape(shapes: list[tuple[int, ...]], layout: str) -> tuple[int, ...]:
    """Shape of a tensor whose parts, by `outward`, have these."""
    whole = list(shapes[0])
    whole[AXES[layout]] = sum(shape[AXES[layout]] for shape in shapes)
    return tuple(whole)


def file_shape(shapes: list[tuple[int, ...]], layout: str) -> tuple[int, ...]:
    """The same as the file has it: heads and their channels, or channels and their parts, are one axis."""
    whole = joined_shape(shapes, layout)
    if layout == "heads":
        return (whole[0] * whole[1], whole[2])
    return (*whole[:-2], whole[-2] * whole[-1]) if layout == "turns" else whole


def cut(tensor: np.ndarray, shapes: list[tuple[int, ...]], index: int, layout: str) -> np.ndarray:
    """Part `index` of a tensor of the file whose parts, by `outward`, have these shapes."""
    axis = AXES[layout]
    ends = np.cumsum([shape[axis] for shape in shapes])[:-1]
    return np.split(tensor.reshape(joined_shape(shapes, layout)), ends, axis=axis)[index]


def halves(array: np.ndarray, channels: int, *, back: bool = False) -> np.ndarray:
    """Order the last `channels` of the last axis: 2 i and 2 i + 1 to i and i + channels / 2, or `back`."""
    order = np.arange(channels).reshape(-1, 2).T.reshape(-1)
    order = np.argsort(order) if back else order
    first = array.shape[-1] - channels
    return np.concatenate([array[..., :first], array[..., first:][..., order]], axis=-1)


class Tensor(NamedTuple):
    """One tensor of the files: its name, the leaves that it has, of these one layer (or expert), and its layout.

    `place` is the layer's, and the expert's, index in the leaves; see `tessera.serving.families.Stored`.
    """

    name: str
    parts: tuple[str, ...]
    place: tuple[int, ...] = ()
    layout: str = "rows"

    def shapes(self, leaves: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Shapes of the parts by `outward`, from those of the leaves."""
        return [outward_shape(path, leaves[path][len(self.place) :], self.layout) for path in self.parts]


def tensors_of(config: TransformerConfig, family: Family) -> Iterator[Tensor]:
    """All tensors of a model."""
    stacks = {stack.name: stack for stack in config.stacks}
    for path, _ in _leaves(config):
        if path in SHARED:
            yield Tensor(SHARED[path], (path,))
            continue
        part, _, inner = path.partition("/")
        stack, inside = stacks[part], 0
        if len(stack.pattern) > 1:
            block, _, inner = inner.partition("/")
            inside = int(block.removeprefix("layer_"))
        where = stored(inner, family)
        parts = where.parts or (inner,)
        if inner != parts[0]:  # comes with the first
            continue
        paths, experts = tuple(path.removesuffix(inner) + one for one in parts), "{e}" in where.name
        for unit in range(stack.units):
            layer = stack.start + unit * len(stack.pattern) + inside
            for expert in range(config.moe.router.experts if experts else 1):
                index = (unit, expert) if experts else (unit,)
                yield Tensor(where.name.format(l=layer, e=expert), paths, index, where.layout)


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise NotConvertible(f"{name} has shape {found}; config.json asks for {wanted}")


def _outward(params: PyTree, config: TransformerConfig, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(params)
    }
    for path, shape in _leaves(config):
        leaf = leaves.get(path)
        if leaf is None or tuple(leaf.shape) != shape:
            raise NotConvertible(f"{path} should have shape {shape}; export takes scanned blocks, unquantised")
    family = family_of(config)
    for tensor in tensors_of(config, family):
        parts = []
        for path in tensor.parts:
            leaf = leaves[path]
            array = np.asarray(jnp.asarray(leaf[tensor.place] if tensor.place else leaf, jnp.float32))
            array = halves(array, config.latent.rope_dim, back=True) if path.endswith(family.pairs) else array
            parts.append(outward(array, path, tensor.layout))
        shape = file_shape([part.shape for part in parts], tensor.layout)
        array = np.concatenate(parts, axis=AXES[tensor.layout]).reshape(shape)
        yield tensor.name, np.ascontiguousarray(array.astype(dtype))


class _File(NamedTuple):
    """An open file, of which float8 tensors can be read too."""

    handle: Any
    path: Path

    def get_tensor(self, name: str) -> np.ndarray:
        if self.handle.get_slice(name).get_dtype() != packed.FLOAT8:
            return self.handle.get_tensor(name)
        with self.path.open("rb") as file:  # numpy has no such dtype, and safetensors asks it for one
            header = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(header))[name]
            begin, end = entry["data_offsets"]
            file.seek(8 + header + begin)
            return np.frombuffer(file.read(end - begin), ml_dtypes.float8_e4m3fn).reshape(entry["shape"])


def _open(directory: Path) -> dict[str, Any]:
    """Tensor name -> open file: of the index, else model.safetensors, else the only file there is."""
    safe_open = safetensors_module().safe_open
    files = sorted(file.name for file in directory.glob("*.safetensors"))
    where: Any = read_object(directory / INDEX).get("weight_map") if (directory / INDEX).exists() else {}
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise NotConvertible(f"{directory / INDEX} is damaged: weight_map must name a file for every tensor")
    if where:
        files = sorted(set(where.values()))
    elif "model.safetensors" in files:
        files = ["model.safetensors"]
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {directory}")
    if len(files) > 1 and not where:
        raise NotConvertible(
            f"{directory} has {', '.join(files)} and neither model.safetensors nor {INDEX}: which are the model's?"
        )
    if missing := [name for name in files if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{directory / INDEX} names {', '.join(map(repr, missing))}: no such file")
    handles = {}
    for name in files:
        try:
            handles[name] = _File(safe_open(directory / name, framework="numpy"), directory / name)
        except OSError:
            raise
        except Exception as error:  # safetensors' own kind
            raise NotConvertible(f"{directory / name} is damaged: {error}") from error
    inside = {file: set(one.handle.keys()) for file, one in handles.items()}
    if not where:
        return {name: handles[file] for file, names in inside.items() for name in names}
    if wrong := [f"{name} in {file}" for name, file in where.items() if name not in inside[file]]:
        raise NotConvertible(f"{directory / INDEX} names {some(wrong)}: not there")
    return {name: handles[file] for name, file in where.items()}


def _more_layers(c: Mapping[str, Any]) -> range:
    """Layers of a file that predict further tokens (DeepSeek-V3), which transformers does not read either."""
    return range(c["num_hidden_layers"], c["num_hidden_layers"] + (c.get("num_nextn_predict_layers") or 0))


def _check_names(
    directory: Path,
    tensors: dict[str, Any],
    config: TransformerConfig,
    family: Family,
    more: range,
    quantized: Mapping[str, packed.Module],
) -> None:
    """Refuse tensors that are missing, of another shape, quantized or asked for by no parameter; none is read."""
    try:
        shapes = dict(_leaves(config))
    except (OverflowError, TypeError, ValueError) as error:
        raise NotConvertible(f"{directory}: no model has the sizes of its config.json ({error})") from error
    wanted: set[str] = set()
    beside: set[str] = set()  # tensors of quantized projections
    missing: list[str] = []
    for tensor in tensors_of(config, family):
        if module := quantized.get(tensor.name):
            beside.update(module.parts.values())
            wanted_shape = file_shape(tensor.shapes(shapes), tensor.layout)
            _check_shape(f"{directory}: {tensor.name}", module.shape, wanted_shape)
        elif tensor.name in tensors:
            wanted.add(tensor.name)
            found = tuple(tensors[tensor.name].handle.get_slice(tensor.name).get_shape())
            _check_shape(f"{directory}: {tensor.name}", found, file_shape(tensor.shapes(shapes), tensor.layout))
        else:
            missing.append(tensor.name)
        if len(missing) > 1000:  # a config.json of any number of layers
            break
    if missing:
        raise NotConvertible(f"{directory} has no tensor {some(sorted(missing))}")
    kinds = {name: tensors[name].handle.get_slice(name).get_dtype() for name in sorted(wanted)}
    if others := [f"{name} ({kind})" for name, kind in kinds.items() if kind not in DTYPES]:
        raise NotConvertible(f"{directory} has quantized weights: {some(others)}; {', '.join(DTYPES)} load")
    layers = tuple(f"model.layers.{layer}." for layer in more)
    rest = {
        name for name in tensors.keys() - wanted - beside if not (IGNORED.fullmatch(name) or name.startswith(layers))
    }
    table, head = SHARED["embed/table"], SHARED["head/kernel"]
    if config.tied and head in rest:
        if not np.array_equal(tensors[head].get_tensor(head), tensors[table].get_tensor(table)):
            raise NotConvertible(
                f"{directory}: {head} differs from {table}, but config.json says tie_word_embeddings; with false the "
                "head is read, without the tensor the table is used"
            )
        rest.remove(head)
    if rest:
        raise NotConvertible(
            f"{directory} has {len(rest)} tensors that a model of its config.json lacks: {some(sorted(rest))}"
        )


def some(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value


def safetensors_module() -> Any:
    """Import safetensors; ImportError with the extra's name where it is not installed."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("Hugging Face directories need the extra `hf`: pip install 'tessera-jax[hf]'") from error
    return safetensors


def is_directory(path: Path | str) -> bool:
    """Whether a directory looks like Hugging Face's rather than a run's."""
    file = Path(path) / CONFIG
    return file.exists() and "model_type" in read_object(file)
