"""Continue a text. `python scripts/generate.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("generate")
