"""Fit a scaling law. `python scripts/fit_scaling.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("fit")
