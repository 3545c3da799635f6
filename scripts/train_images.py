"""Train on pictures that are larger than memory. `python scripts/train_images.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("train-images")
