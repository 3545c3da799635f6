"""Train a sweep of model sizes and fit it. `python scripts/sweep.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("sweep")
