"""Run an experiment on tickets. `python scripts/study.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("study")
