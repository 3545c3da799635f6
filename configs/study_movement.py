"""How far do weights move from their initialization, by Adam, momentum and Muon, and is a picture in them erased?

What: five dense networks by each optimizer at three learning rates, the best of which counts: correlation with the
initialization and distance from it, by layer; and the same with a training image drawn into the second matrix. `:mnist`
is LeNet on MNIST at 14 x 14 pixels, `:text` a small decoder on tinyshakespeare, `:tiny` a minute on digits.
Cost: see docs/results/weight_movement.md.
Expected: no: weights correlate with their initialization by 0.57 (Adam) to 0.82 (momentum), and the picture is plain to
see; Muon is the most accurate. `:text` not measured.
Command: python scripts/study.py --config=configs/study_movement.py --config.data.dir=DATA --workdir=runs/movement
"""

from ml_collections import ConfigDict

VARIANTS = {
    "mnist": "LeNet on MNIST at 14 x 14 pixels",
    "text": "a small decoder on tinyshakespeare, without a picture",
    "tiny": "a minute on digits, no files needed",
}


def get_config(variant: str = "mnist") -> ConfigDict:
    """The experiment."""
    tiny, text = variant == "tiny", variant == "text"
    config = ConfigDict()
    config.name = "movement"
    config.seeds = (0, 1) if tiny else (0, 1, 2, 3, 4)
    config.data = ConfigDict({"name": "digits", "validation": 100} if tiny else {"name": "mnist", "shrink": 2})
    config.model = ConfigDict({"hidden": (32, 16) if tiny else (300, 100)})
    config.train = ConfigDict({"steps": "60it" if tiny else "1000it", "eval_every": 100})
    config.search = ConfigDict({"levels": 0})
    config.study = ConfigDict({"steps": (10, 30) if tiny else (10, 30, 100, 300)})
    rates = {"adam": (1.2e-3, 4e-3, 1.2e-2), "momentum": (0.02, 0.06, 0.2), "muon": (1.2e-3, 4e-3, 1.2e-2)}
    config.study.optimizers = tuple((name, lr) for name, some in rates.items() for lr in (some[1:2] if tiny else some))
    if text:
        config.data = ConfigDict({"kind": "text", "length": 64, "test_limit": 64})
        config.data.text = ConfigDict({"name": "tinyshakespeare"})
        config.model = ConfigDict({"name": "decoder", "layers": 2, "width": 64, "heads": 4, "ff": 128})
        config.train.update({"steps": "400it", "batch_size": 16})
        config.search.output = ""
        config.study.layer = ""
    return config
