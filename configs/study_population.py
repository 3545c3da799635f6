"""Many tickets cheaply: populations of initializations, and overwide networks cut to size, on MNIST.

What: 24 initializations in one program, scored after 50 steps; how far that score foretells the final accuracy; then
many overwide draws, the best trained on, pruned by neurons to the target width, cut out, distilled and trained on,
beside what each part of the recipe gives alone. `:tiny` is a minute on digits.
Cost: see docs/results/population_mnist.md.
Expected: as measured, the score after 50 steps foretells nothing, and the recipe gains nothing over a single draw.
Command: python scripts/study.py --config=configs/study_population.py --config.data.dir=DATA --workdir=runs/population
"""

from ml_collections import ConfigDict

VARIANTS = {"mnist": "the experiment, on MNIST", "tiny": "a minute on digits, no files needed"}


def get_config(variant: str = "mnist") -> ConfigDict:
    """The experiment."""
    tiny = variant == "tiny"
    config = ConfigDict()
    config.name = "population"
    config.seeds = (0,)
    config.lr = 2e-3
    config.data = ConfigDict({"name": "digits" if tiny else "mnist"})
    config.data.validation = 100 if tiny else 2000
    config.data.shrink = 1 if tiny else 2
    config.train = ConfigDict(
        {
            "steps": "40it" if tiny else "800it",
            "eval_every": 20 if tiny else 200,
        }
    )
    config.search = ConfigDict({"levels": 0})
    config.study = ConfigDict(
        {
            "hidden": (8, 4) if tiny else (24, 12),
            "factor": 2 if tiny else 4,
            "draws": 4 if tiny else 24,
            "repeats": 2 if tiny else 6,
            "short": 10 if tiny else 50,
        }
    )
    return config
