"""Measure what 8 and 4 bits cost. `python scripts/quantize.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("quantize")
