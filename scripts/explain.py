"""Explain a training step under a plan before it runs. `python scripts/explain.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("explain")
