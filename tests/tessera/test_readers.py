"""Every reader of files meets damaged ones: it reads them, or says in one error which file, and what it should be."""

import gzip
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pytest
import safetensors.numpy
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from lottery import export
from scaling.rows import RowError
from scaling.sweeps.store import read_row
from scaling.tables import read_rows as read_table
from tessera.data.documents import read_documents
from tessera.data.images import ImageConfig, _read_cifar_archive, decode, load_images, read_idx
from tessera.data.text import BPETokenizer, ByteTokenizer
from tessera.data.token_files import open_tokens
from tessera.infra.errors import RemoteError
from tessera.infra.logger import read_rows
from tessera.infra.memo import Memo
from tessera.infra.remote import MANIFEST, local
from tessera.infra.workdir import FORMAT, read_settings, was_finished
from tessera.models.transformer import TransformerConfig
from tessera.serving import gguf
from tessera.serving.adapters import load_adapters
from tessera.serving.chat import BadChat, ChatFormat
from tessera.serving.families import NotConvertible
from tessera.serving.huggingface import is_directory, load_directory, read_config, read_format, write_config
from tessera.serving.load import own_tokenizer, read_calibration

LLAMA = TransformerConfig(vocab_size=256, layers=2, width=16, heads=4, kv_heads=2, ff=16)
ROWS = [{"step": 1, "kind": "train", "loss": 0.5}, {"step": 2, "kind": "eval", "loss": "nan"}]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
BPE = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "a", "special": True, **dict.fromkeys(FLAGS, False)}],
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "unk_token": None, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}


@dataclass(frozen=True)
class Reader:
    """A reader of one file.

    Attributes:
      read: called with the file's path.
      sound: what a sound file holds: bytes, or a JSON value.
      rest: files beside it by name, bytes or JSON values.
      whole_path: errors have the file's path, or that of its directory; else its name is enough.
    """

    read: Callable[[Path], Any]
    sound: Any
    rest: tuple[tuple[str, Any], ...] = ()
    whole_path: bool = True


def memo_rows(path):
    return Memo(path.parent).rows(path.stem, list)


def documents(path):
    return list(read_documents(path, "text"))


def arrays(path):
    return load_images(ImageConfig(name=str(path)))


def model(path):
    return load_directory(path.parent)


def text_format(path):
    return read_format(path.parent)


def chat(path):
    form = ChatFormat(ByteTokenizer(), read_format(path.parent))
    try:
        form.render([{"role": "user", "content": "Hi"}])
    except BadChat:  # refused when a request has messages
        pass


def gguf_file(path):
    gguf.load_gguf(path)
    gguf.read_tokenizer(path)
    gguf.read_format(path)


def manifest(path):
    """What is at a URL of fsspec's file system in memory."""
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/{path.parent.name}/{MANIFEST}", path.read_bytes())
    try:
        local(f"memory://{path.parent.name}")
    except RemoteError as error:  # of the URL, which has no path here
        raise (ValueError(f"{path}: {error}") if path.parent.name in str(error) else error) from error


def made_gguf():
    """A GGUF file of one layer whose tensors are zeros."""
    package = pytest.importorskip("gguf")
    names = {"token_embd": (9, 8), "output_norm": (8,), "attn_norm": (8,), "ffn_norm": (8,), "attn_q": (8, 8)}
    names |= {"attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
    names |= {"ffn_gate": (4, 8), "ffn_up": (4, 8), "ffn_down": (8, 4)}
    with tempfile.TemporaryDirectory() as folder:
        writer = package.GGUFWriter(file := Path(folder) / "model.gguf", "llama")
        writer.add_embedding_length(8)
        writer.add_block_count(1)
        writer.add_feed_forward_length(4)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<|end|>", *"abcdefg", "ab"])
        writer.add_token_types([3] + [1] * 8)
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(0)
        for name, shape in names.items():
            name = name if name.startswith(("token", "output")) else f"blk.0.{name}"
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()


def made_ticket():
    with tempfile.TemporaryDirectory() as folder:
        tree = {"a": {"kernel": np.ones((4, 3), np.float32)}, "b": np.ones(2, np.float32)}
        mask = {"a": {"kernel": np.eye(4, 3) > 0}, "b": np.ones(2, bool)}
        return export.save(Path(folder) / "ticket.safetensors", tree, mask).read_bytes()


def written(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


PICTURES = {"x": np.zeros((30, 2, 2), np.uint8), "y": np.arange(30) % 3}
DOCUMENTS = b'{"text": "a"}\n{"text": "b"}\n'
# Two sequences of two tokens of two bytes, a document each: see tessera.data.token_files.
INDEX = b"MMIDIDX\0\0" + struct.pack("<QBQQ2i2q3q", 1, 8, 2, 3, 2, 2, 0, 4, 0, 1, 2)
GOLDEN = Path(__file__).parents[1] / "golden"
FOUND = GOLDEN / "huggingface"


def model_files(*parts):
    """config.json, a JSON value, and model.safetensors of a directory that other libraries wrote."""
    folder = FOUND.joinpath(*parts)
    return json.loads((folder / "config.json").read_text()), (folder / "model.safetensors").read_bytes()


LLAMA_CONFIG, LLAMA_WEIGHTS = model_files("llama")
SHARDS = {"weight_map": dict.fromkeys(safetensors.numpy.load(LLAMA_WEIGHTS), "model.safetensors")}
ADAPTER = (GOLDEN / "lora" / "llama" / "adapter_model.safetensors").read_bytes()
ADAPTER_CONFIG = json.loads((GOLDEN / "lora" / "llama" / "adapter_config.json").read_text())
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE, "added_tokens_decoder": {}}
FITTED = [{"params": 1e6 * n, "tokens": 1e8, "loss": 3 - n / 9} for n in range(1, 4)]


def adapter(path):
    return load_adapters(path.parent, read_config(FOUND / "llama"))


READERS = {
    "metrics.jsonl": Reader(read_rows, "".join(json.dumps(row) + "\n" for row in ROWS).encode()),
    "config.json": Reader(
        lambda path: read_settings(path.parent), {"seed": 1, "model": {"width": 8}}, (("run.json", {"format": FORMAT}),)
    ),
    "run.json": Reader(
        lambda path: read_settings(path.parent), {"format": FORMAT, "name": "x"}, (("config.json", {"seed": 1}),)
    ),
    "memo.json": Reader(memo_rows, ROWS),
    "readout.json": Reader(read_row, {"run": "w8", "steps": 20, "loss": 2.5}),
    "bytes.json": Reader(ByteTokenizer.load, {"tessera_tokenizer": "bytes"}),
    "bpe.json": Reader(BPETokenizer.load, BPE),
    "images.gz": Reader(lambda path: read_idx(path, 3), gzip.compress(b"\0\0\x08\3" + b"\0\0\0\2" * 3 + bytes(8))),
    "labels.gz": Reader(lambda path: read_idx(path, 1), gzip.compress(b"\0\0\x08\1" + b"\0\0\0\2" + bytes(2))),
    "cifar.tar.gz": Reader(_read_cifar_archive, gzip.compress(bytes(512))),
    "rows.jsonl": Reader(documents, DOCUMENTS),
    "rows.jsonl.gz": Reader(documents, gzip.compress(DOCUMENTS)),
    "rows.jsonl.zst": Reader(documents, zstandard.compress(DOCUMENTS)),
    "rows.parquet": Reader(documents, written(lambda file: parquet.write_table(pyarrow.table({"text": ["a"]}), file))),
    "ids.npy": Reader(open_tokens, written(lambda file: np.save(file, np.arange(9, dtype=np.uint16)))),
    "ids.json": Reader(
        lambda path: open_tokens(path.with_suffix(".bin")),
        {"dtype": "uint16", "vocab_size": 9, "tokens": 4, "separator": 0, "sha256": ""},
        (("ids.bin", 12345678),),
    ),
    "pair.idx": Reader(open_tokens, INDEX, (("pair.bin", 12345678),)),
    "pictures.npz": Reader(arrays, written(lambda file: np.savez(file, **PICTURES))),
    "packed.npz": Reader(arrays, written(lambda file: np.savez_compressed(file, **PICTURES))),
    "picture.png": Reader(decode, written(lambda file: Image.fromarray(np.eye(9, dtype=np.uint8)).save(file, "png"))),
    "picture.jpg": Reader(decode, written(lambda file: Image.fromarray(np.eye(9, dtype=np.uint8)).save(file, "jpeg"))),
    "config.json of a model": Reader(lambda path: read_config(path.parent), write_config(LLAMA)),
    "config.json that may be a model": Reader(lambda path: is_directory(path.parent), write_config(LLAMA)),
    "config.json with a tokenizer": Reader(
        lambda path: own_tokenizer(path.parent, LLAMA), {"data": {"tokenizer": "bytes"}, "data_sha256": "0" * 64}
    ),
    "finished.json": Reader(lambda path: was_finished(path.parent, "x"), {"settings": "x"}, (("report.html", 0),)),
    "manifest.json": Reader(manifest, {"files": {"config.json": "0" * 64}}),
    "ticket.safetensors": Reader(export.load, made_ticket()),
    "runs.csv": Reader(read_table, b"params,tokens,loss\n1e6,1e8,3\n2e6,1e8,2.9\n", whole_path=False),
    "runs.json": Reader(read_table, FITTED, whole_path=False),
    "runs.jsonl": Reader(read_table, b'{"params": 1e6, "tokens": 1e8, "loss": 3}\n', whole_path=False),
    "runs.parquet": Reader(
        read_table,
        written(lambda file: parquet.write_table(pyarrow.Table.from_pylist(FITTED), file)),
        whole_path=False,
    ),
    "model.safetensors": Reader(model, LLAMA_WEIGHTS, (("config.json", LLAMA_CONFIG),)),
    "model.safetensors.index.json": Reader(
        model, SHARDS, (("config.json", LLAMA_CONFIG), ("model.safetensors", LLAMA_WEIGHTS))
    ),
    **{
        f"model.safetensors of {name}": Reader(model, model_files("quantized", name)[1], (("config.json", config),))
        for name in ("gptq-act-order", "awq", "int4-asymmetric", "fp8")
        for config in [model_files("quantized", name)[0]]
    },
    **{
        f"config.json of {name}": Reader(model, config, (("model.safetensors", weights),))
        for name in ("gptq", "int4", "fp8")
        for config, weights in [model_files("quantized", name)]
    },
    "adapter_config.json": Reader(adapter, ADAPTER_CONFIG, (("adapter_model.safetensors", ADAPTER),)),
    "adapter_model.safetensors": Reader(adapter, ADAPTER, (("adapter_config.json", ADAPTER_CONFIG),)),
    "model.gguf": Reader(gguf_file, made_gguf()),
    "tokenizer_config.json": Reader(chat, SPECIAL, (("config.json", LLAMA_CONFIG),)),
    **{
        f"{name} of a tokenizer": Reader(lambda path: BPETokenizer.load(path.parent / "tokenizer.json"), sound, beside)
        for beside in [(("tokenizer.json", BPE),)]
        for name, sound in (
            ("tokenizer_config.json", SPECIAL | {"added_tokens_decoder": {"3": {"content": "c", "special": True}}}),
            ("special_tokens_map.json", {"eos_token": {"content": "c"}, "additional_special_tokens": ["d"]}),
            ("added_tokens.json", {"c": 3}),
        )
    },
    "special_tokens_map.json": Reader(
        text_format, {"bos_token": "<s>"}, (("config.json", LLAMA_CONFIG), ("tokenizer_config.json", {}))
    ),
    "generation_config.json": Reader(text_format, {"eos_token_id": [1, 2]}, (("config.json", LLAMA_CONFIG),)),
    "chat_template.jinja": Reader(
        chat, TEMPLATE.encode(), (("config.json", LLAMA_CONFIG), ("tokenizer_config.json", SPECIAL))
    ),
    "text": Reader(lambda path: read_calibration(path, ByteTokenizer(), 1, 4), "text of é".encode()),
}
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from([2**40, 10**30])
)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)


def damaged(data, sound):
    """Bytes of a sound file with some of it replaced: values of its JSON, or bytes."""
    if not isinstance(sound, bytes):
        sound = json.loads(json.dumps(sound))
        for _ in range(data.draw(st.integers(0, 2))):
            parent, key, here = None, None, sound
            while isinstance(here, dict | list) and here and (parent is None or data.draw(st.booleans())):
                parent = here
                key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
                here = here[key]
            if parent is None or data.draw(st.integers(0, 9)) == 0:
                sound = data.draw(VALUES)
            elif data.draw(st.integers(0, 3)) == 0:
                del parent[key]
            else:
                parent[key] = data.draw(VALUES)
        sound = json.dumps(sound).encode()
        if data.draw(st.booleans()):
            return sound
    for _ in range(data.draw(st.integers(1, 2))):
        begin = data.draw(st.integers(0, len(sound)))
        size = data.draw(st.sampled_from([0, 1, 4, len(sound)]))
        sound = sound[:begin] + data.draw(st.binary(max_size=4)) + sound[begin + size :]
    return sound


def beside(path, reader):
    """Write the files beside a reader's own."""
    for other, value in reader.rest:
        (path.parent / other).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=int(os.environ.get("TESSERA_FUZZ", "60")))
@given(data=st.data())
def test_a_damaged_file_is_read_or_named(name, data, tmp_path_factory):
    reader = READERS[name]
    path = tmp_path_factory.getbasetemp() / "readers" / name.replace(" ", "_") / name.split()[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside(path, reader)
    path.write_bytes(damaged(data, reader.sound))
    try:
        reader.read(path)
    except (ValueError, FileNotFoundError) as error:
        assert (str(path.parent) if reader.whole_path else path.name) in str(error), error
        assert "\n" not in str(error) or isinstance(error, RowError)  # which lists cells


@pytest.mark.parametrize("name", [name for name in READERS if name != "cifar.tar.gz"])
def test_a_sound_file_is_read(name, tmp_path):
    reader = READERS[name]
    path = tmp_path / name.split()[0]
    beside(path, reader)
    path.write_bytes(reader.sound if isinstance(reader.sound, bytes) else json.dumps(reader.sound).encode())
    reader.read(path)


def test_what_json_can_do_to_a_reader_is_one_line(tmp_path):
    for text in (b"[" * 100_000, b"1" * 5000, b'{"a": ' * 5000, b"\xed\xa0\x80"):
        for name, reader in READERS.items():
            if isinstance(reader.sound, bytes) or name == "finished.json":  # if damaged, the run is not finished
                continue
            for file in tmp_path.iterdir():
                file.unlink()
            beside(tmp_path / "x", reader)
            (path := tmp_path / name.split()[0]).write_bytes(text)
            with pytest.raises(ValueError, match="damaged|no tokenizer|format|version|dtype|not JSON|UTF-8"):
                reader.read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": []}},
        {"rope_parameters": {"rope_theta": [None]}},
        {"layer_types": [[]]},
        {"layer_types": 5},
    ],
)
def test_an_entry_of_another_type_is_named(changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(write_config(LLAMA) | changes))
    with pytest.raises(NotConvertible, match=f"{tmp_path}/config.json: .*(must be|none of)"):
        read_config(tmp_path)


def test_sizes_of_a_config_allocate_nothing(tmp_path):
    """A config.json of some hundred bytes that asks for an exbibyte."""
    safetensors = pytest.importorskip("safetensors.numpy")
    from tessera.serving.huggingface import load_directory

    safetensors.save_file({"model.embed_tokens.weight": np.zeros((4, 4), np.float32)}, tmp_path / "model.safetensors")
    for changes in ({"vocab_size": 2**30, "hidden_size": 2**30}, {"num_hidden_layers": 2**31 - 1}, {"vocab_size": 4}):
        (tmp_path / "config.json").write_text(json.dumps(write_config(LLAMA) | changes))
        with pytest.raises(NotConvertible, match="asks for|has no tensor|no model has"):
            load_directory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(NotConvertible, match="model.safetensors is damaged"):
        load_directory(tmp_path)
