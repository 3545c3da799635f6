"""Perplexity and bits per byte of texts. `python scripts/evaluate.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("evaluate")
