"""Prune a trained language model in several ways, over draws of calibration text, without training it again.

What: half of the weights by magnitude, Fisher information, Wanda and SparseGPT; the last three 2:4 as well; half of the
16 x 16 blocks by SparseGPT; and a tenth of the heads, neurons or blocks cut out. Every draw of calibration text is a
pair: all arms score the same part of the text. `:tiny` has two draws and few tokens.
Cost: not measured; every arm of a draw is kept, and the same command goes on.
Expected: on text like the calibration text SparseGPT loses least, then Wanda, then magnitude; 2:4 loses more than
unstructured (Frantar and Alistarh 2023; Sun et al. 2024).
Command: python scripts/compare_pruning.py --config=configs/compare_pruning.py --config.model.dir=models/smollm2 \
  --config.texts=tinyshakespeare --workdir=runs/compare_pruning
"""

from ml_collections import ConfigDict

VARIANTS = {"": "five draws, 10,000 tokens of every text each", "tiny": "two draws, 500 tokens"}


def get_config(variant: str = "") -> ConfigDict:
    """The arms."""
    config = ConfigDict()
    config.model = ConfigDict({"dir": "runs/lm"})
    config.arms = ConfigDict(
        {
            "magnitude": {"method": "magnitude"},
            "fisher": {"method": "fisher"},
            "wanda": {"method": "wanda"},
            "sparsegpt": {"method": "sparsegpt"},
            "magnitude_2of4": {"method": "magnitude", "structure": "2:4"},
            "wanda_2of4": {"method": "wanda", "structure": "2:4"},
            "sparsegpt_2of4": {"method": "sparsegpt", "structure": "2:4"},
            "sparsegpt_blocks": {"method": "sparsegpt", "structure": "16x16"},
            "neurons": {"method": "sparsegpt", "structure": "neuron", "density": 0.9},
            "heads": {"method": "sparsegpt", "structure": "head", "density": 2 / 3},
            "layers": {"method": "influence", "structure": "layer", "density": 0.9},
        }
    )
    if variant == "tiny":
        config.draws, config.tokens = (0, 1), 500
        config.calibration = ConfigDict({"sequences": 8, "length": 64})
    return config
