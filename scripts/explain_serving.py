"""Explain what plans cost a served model. `python scripts/explain_serving.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("explain-serving")
