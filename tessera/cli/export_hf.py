"""Write a model as a Hugging Face directory: `tessera export-hf runs/lm models/lm`."""

import argparse
import sys
from collections.abc import Sequence

from tessera.cli.main import PLAIN
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.errors import DiskFull, WorkdirInUse
from tessera.serving.load import SourceConfig, export_directory, load

ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError, ValueError, ImportError)


def main(argv: Sequence[str] = ()) -> int:
    """Read the model, write the directory; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tessera export-hf", description=PLAIN["export-hf"][1])
    parser.add_argument("source", help="run of the training script, Hugging Face directory, or GGUF file (.gguf)")
    parser.add_argument("directory", help="new directory to write")
    parser.add_argument("--step", type=int, default=0, help="checkpoint of a run; the default is the newest")
    parser.add_argument("--ticket", default="", help="file of lottery.export.save whose weights replace the run's")
    parser.add_argument("--adapter", default="", help="LoRA adapter of peft (a directory) to merge into the weights")
    parser.add_argument("--tokenizer", default="", help="tokenizer.json; the default is the model's own")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    options = parser.parse_args(list(argv))
    try:
        source = SourceConfig(options.source, options.ticket, options.adapter, options.tokenizer, step=options.step)
        loaded = load(source)
        made = export_directory(loaded, options.directory, options.dtype)
    except (*ERRORS, CheckpointDamaged, DiskFull, WorkdirInUse) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{made}: {loaded.config.layers} layers, vocabulary {loaded.config.vocab_size}, {options.dtype}")
    return 0
