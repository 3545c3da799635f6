"""Train a language model. `python scripts/train.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("train")
