"""Prune a trained language model. `python scripts/prune.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("prune")
