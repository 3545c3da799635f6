"""Train arms over seeds and compare them. `python scripts/compare.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("compare")
