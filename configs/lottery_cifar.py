"""Winning tickets of convolutional networks and a vision transformer on CIFAR-10.

What: Conv-2, Conv-4, Conv-6 as in Frankle & Carbin (2019), section 3 and figure 2 (Adam, batch 60, convolutions pruned
by 10, 10 and 15% a round, dense layers by 20%, the output layer by 10%); VGG-16, VGG-19 and ResNet-20 with late
rewinding as in Frankle et al. (2020) (momentum 0.1, pruned globally by 20% a round, batch normalization; images are not
augmented here, as they are there); a small vision transformer. `:resnet20-group` has group normalization. A name with
`-small` (`:conv2-small`, `:resnet20-small`, ...) is a narrow network on a few thousand images of 16 x 16, three levels:
minutes on a CPU, and no result to be quoted.
Cost: not measured, for any of them at full size; they are for accelerators.
Expected: tickets match the dense network down to about a tenth of the weights (Conv-2/4/6), and with late rewinding to
about a fifth (ResNet-20); not measured here.
Command: python scripts/find_ticket.py --config=configs/lottery_cifar.py:resnet20 --config.data.dir=DATA --workdir=RUN
"""

from ml_collections import ConfigDict

# Rate of the convolutions and steps: Frankle & Carbin (2019), figure 2.
CONV = {"conv2": (0.1, "20000it", 2e-4), "conv4": (0.1, "25000it", 3e-4), "conv6": (0.15, "30000it", 3e-4)}
LATE = {"resnet20": "1000it", "resnet20-group": "1000it", "vgg16": "200it", "vgg19": "200it"}
SMALL = {
    "conv2": {"blocks": ((8, 8),), "dense": (32, 32)},
    "conv4": {"blocks": ((8, 8), (16, 16)), "dense": (32, 32)},
    "conv6": {"blocks": ((8, 8), (16, 16), (16, 16)), "dense": (32, 32)},
    "vgg16": {"blocks": ((8, 8), (16, 16), (16, 16, 16))},
    "vgg19": {"blocks": ((8, 8), (16, 16), (16,) * 4)},
    "resnet20": {"widths": (4, 8, 16)},
    "resnet20-group": {"widths": (4, 8, 16), "groups": 4},
    "vit": {"layers": 2, "width": 32, "heads": 2, "ff": 64},
}

VARIANTS = {
    "resnet20": "ResNet-20, late rewinding",
    "resnet20-group": "the same with group normalization",
    "conv2": "Conv-2, rewound to initialization",
    "conv4": "Conv-4",
    "conv6": "Conv-6",
    "vgg16": "VGG-16, late rewinding",
    "vgg19": "VGG-19",
    "vit": "a small vision transformer",
    "resnet20-small": "for a CPU, a narrow network, three levels",
    "resnet20-group-small": "for a CPU",
    "conv2-small": "for a CPU",
    "conv4-small": "for a CPU",
    "conv6-small": "for a CPU",
    "vgg16-small": "for a CPU",
    "vgg19-small": "for a CPU",
    "vit-small": "for a CPU",
}


def get_config(variant: str = "resnet20") -> ConfigDict:
    """The search of one network."""
    name, small = variant.removesuffix("-small"), variant.endswith("-small")
    config = ConfigDict()
    config.seeds = (0, 1, 2)
    config.data = ConfigDict({"name": "cifar10"})
    config.model = ConfigDict({"name": name.split("-")[0]})
    if name == "resnet20-group":
        config.model.norm = "group"
    schedule = {"batch_size": 60, "eval_every": 500, "save_seconds": 60.0}
    search: dict[str, object] = {}
    if name in CONV:
        rate, steps, config.lr = CONV[name]
        search |= {"levels": 20, "rates": (("^conv", rate),)}
    elif name == "vit":
        steps, config.lr = "30000it", 5e-4
        config.optimizer = ConfigDict({"name": "adamw", "schedule": "cosine", "warmup": 1000, "final": 0.01})
        search |= {"levels": 10, "scope": "global", "rewind": "1000it"}
    else:
        steps, config.lr = "63000it", 0.1
        config.optimizer = ConfigDict(
            {"name": "momentum", "schedule": "multistep", "milestones": (32_000, 48_000), "weight_decay": 1e-4}
        )
        schedule["batch_size"] = 128
        search |= {"levels": 12, "scope": "global", "rewind": LATE[name]}
    config.train = ConfigDict({"steps": steps, **schedule})
    config.search = ConfigDict(search)
    return shrunk(config, name) if small else config


def shrunk(config: ConfigDict, name: str) -> ConfigDict:
    """The same for a CPU: a narrow network, few images, three levels."""
    config.seeds = (0, 1)
    config.data.update({"limit": 4000, "test_limit": 1000, "validation": 500, "shrink": 2})
    config.model.update(SMALL[name])
    config.lr = 1e-3
    config.optimizer = ConfigDict({"name": "adam"})
    config.train.update({"steps": "150it", "batch_size": 32, "eval_every": 50})
    config.search.update({"levels": 3, "rewind": "0it" if name in CONV else "20it"})
    return config
