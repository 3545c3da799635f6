"""A network on class folders of pictures, decoded and augmented by grain's workers as it trains.

What: ResNet-20 with batch normalization (He et al. 2016) on `config.data.name`, a directory of class folders, with its
recipe's momentum, cosine schedule and augmentation (a crop of 4 pixels, mirrored halves). `tiny` has a dense network
and 60 steps.
Cost: not measured at full size; `tiny` takes seconds on two cores.
Expected: not measured; `tiny` learns the pictures that the first program of docs/data.md makes.
Command: python scripts/train_images.py --config=images --config.data.name=PICTURES --workdir=runs/images
"""

from ml_collections import ConfigDict

VARIANTS = {
    "base": "ResNet-20",
    "tiny": "for a CPU: a dense network and 60 steps",
}


def get_config(variant: str = "base") -> ConfigDict:
    """The settings of one variant."""
    config = ConfigDict()
    if variant == "tiny":
        config.steps, config.batch_size, config.lr = 60, 32, 3e-3
        config.model = ConfigDict({"name": "lenet", "hidden": (32, 16)})
        config.optimizer = ConfigDict({"name": "adam"})
        config.augment = ConfigDict({"size": 8})
        return config
    config.steps, config.batch_size, config.lr = 64_000, 128, 0.1
    config.model = ConfigDict({"name": "resnet20"})
    config.optimizer = ConfigDict({"name": "momentum", "schedule": "cosine", "weight_decay": 1e-4})
    config.augment = ConfigDict({"size": 32, "crop": 4, "flip": True})
    config.eval = ConfigDict({"every": 2000})
    config.checkpoint = ConfigDict({"every": 2000})
    return config
