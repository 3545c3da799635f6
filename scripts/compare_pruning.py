"""Prune a language model in several ways. `python scripts/compare_pruning.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("compare-pruning")
