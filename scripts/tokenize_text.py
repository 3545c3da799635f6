"""Tokenize a corpus once. `python scripts/tokenize_text.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("tokenize")
