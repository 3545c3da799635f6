"""Serve a model over HTTP. `python scripts/serve.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("serve")
