"""What 8 and 4 bits cost a trained language model, by method.

What: a run of `scripts/train.py`, its kernels rounded to nearest, by AWQ and by GPTQ (calibrated on training text), and
the cross-entropy of each on validation text beside the unrounded model's.
Cost: not measured; a few minutes on a loaded CPU core for `configs/lm.py:tiny`, most of it GPTQ and AWQ in numpy.
Expected: 8 bits lose nothing to speak of; 4 bits lose a little, less by GPTQ than to nearest. Measured figures are in
docs/inference.md.
Command: python scripts/quantize.py --config=configs/quantize.py --config.model.dir=runs/lm
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One table."""
    config = ConfigDict()
    config.model = ConfigDict({"dir": "runs/lm"})
    # (bits, method, group): group 0 is one scale per output.
    config.variants = (
        (8, "rtn", 0),
        (4, "rtn", 0),
        (4, "rtn", 32),
        (4, "awq", 0),
        (4, "awq", 32),
        (4, "gptq", 0),
        (4, "gptq", 32),
    )
    return config
