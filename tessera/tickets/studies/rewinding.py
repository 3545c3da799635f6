"""Late rewinding against rewinding to 0: Frankle et al. 2020 (arXiv:1912.05671), section 5, at equal density.

Two searches share their dense networks: in one the survivors go back to the initialization and train the whole
schedule, in the other they go back to step k and train what is left of it. Random masks of equal density in every layer
(in both) and fresh initializations (which have no step k) are the controls: what late rewinding gives them too is no
property of the ticket.
"""

from dataclasses import dataclass, replace
from typing import Any

from lottery import imp, summary
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Memo
from tessera.reports.style import Figure, canvas, deferred, dots, label_lines, line_with_band, look, reference, titles
from tessera.tickets.setup import LevelStore, Setup, make_setup
from tessera.tickets.studies.study import DENSE, Comparison, Study, run_search

UNITS = {"final_test_loss": ("test loss", "nats", 1.0, 3), "final_test_accuracy": ("test accuracy", "points", 100.0, 2)}


@dataclass(frozen=True)
class RewindingConfig:
    """What late rewinding is judged by.

    Attributes:
      value: "final_test_loss" or "final_test_accuracy".
    """

    value: str = "final_test_loss"

    def __post_init__(self):
        if self.value not in UNITS:
            raise ValueError(f"value={self.value!r}: choose one of {', '.join(UNITS)}")


# Arms of `config.search.arms` that the study can compare, and what it calls them.
ARMS = {"ticket": "ticket", "random_mask": "random mask", "reinit": "fresh weights"}


def run(config: Any, memo: Memo) -> Study:
    """Search twice, compare seed by seed."""
    study = build(RewindingConfig, config.study, "config.study")
    setup = make_setup(config)
    arms = setup.search.arms
    if not setup.search.rewind or setup.search.rewind_optimizer or "ticket" not in arms or not set(arms) <= set(ARMS):
        raise ConfigError(
            "config.search: rewind above 0, rewind_optimizer False and arms 'ticket' and, as controls, any of "
            f"{', '.join(map(repr, list(ARMS)[1:]))} are needed here"
        )
    # Fresh weights at step k would have missed the first k steps.
    rewound = tuple(arm for arm in arms if arm != "reinit")
    search, late = run_search(replace(setup, search=replace(setup.search, arms=rewound)), memo, config, "late")
    # The dense networks are the same; what survivors go back to differs.
    early = replace(setup, search=replace(setup.search, rewind=0), ticket=replace(setup.ticket, rewind=0))
    store = LevelStore(memo.directory / "early")
    if not store.has(0):
        tree, dense = search.level(0)
        store.save(0, {**tree, "reset": imp.initial_weights(setup.network.init, setup.search)}, dense)
    _, more = run_search(early, memo, config, "early")
    rows = [*(row for row in _named(more, 0) if row["level"]), *_named(late, setup.search.rewind)]
    return _study(rows, study, setup)


def _name(arm: str, step: int) -> str:
    return ARMS[arm] if arm == "reinit" else f"{ARMS[arm]}, to step {step}"


def _named(rows: list[imp.Row], step: int) -> list[dict[str, Any]]:
    """Rows without their learning curves, with the step that survivors went back to."""
    return [
        {key: value for key, value in row.items() if key != "curve"}
        | {"rewind": step, "survivors": _name(row["arm"], step) if row["level"] else DENSE}
        for row in rows
    ]


def _study(rows: list[dict[str, Any]], study: RewindingConfig, setup: Setup) -> Study:
    name, unit, scale, digits = UNITS[study.value]
    sign = -1 if "loss" in study.value else 1
    heading = f"{name} ({unit if sign < 0 else '%'})"
    arms = Comparison(rows, "survivors", study.value, heading=heading, unit=unit, scale=scale, digits=digits, sign=sign)
    step = setup.search.rewind
    late, zero, random = _name("ticket", step), _name("ticket", 0), _name("random_mask", step)
    findings = []
    for level in arms.levels:

        def told(name: str, base: str, than: str, level: int = level) -> str:
            gains = arms.gains(name, base, level)
            better = sum(gain > 0 for gain in gains)
            return f"{arms.verdict(name, base, level, than)}; better in {better} of {len(gains)} seeds."

        weights = arms.density(level)
        findings.append(
            f"At {weights} of the weights the ticket rewound to step {step} is {told(late, zero, 'one rewound to 0')}"
        )
        if random in arms.arms:
            there = told(random, _name("random_mask", 0), "those of step 0")
            findings.append(f"Under random masks weights of step {step} are {there}")
            there = told(late, random, "a random mask on the same weights")
            findings.append(f"The ticket rewound to step {step} is {there}")
    caption = "After the last step, on the test set; means and 95% intervals over seeds. Dotted: the dense networks."
    bases = {zero: "ticket, to step 0"} | ({random: f"random mask, to step {step}"} if random in arms.arms else {})
    steps = {"steps trained": lambda rows: setup.ticket.steps - (rows[0]["rewind"] if rows[0]["level"] else 0)}
    names = [name for name in (late, zero, random, _name("random_mask", 0), _name("reinit", 0)) if name in arms.arms]
    picture = _figure(arms, names)
    return Study("Late rewinding and rewinding to 0", findings, arms.table(bases, steps), picture, caption, rows)


@deferred
def _figure(arms: Comparison, names: list[str]) -> Figure:
    """The arms over the levels: seeds pale, means with their intervals."""
    figure, (ax,) = canvas(1, width=6.4, height=3.6)
    for i, name in enumerate(names):
        style = look(i)
        cells = [[arms.scale * row[arms.value] for row in arms.cell(name, level)] for level in arms.levels]
        means, halves, _ = zip(*map(summary.interval, cells), strict=True)
        x = [place + 0.04 * (i - (len(names) - 1) / 2) for place in range(len(cells))]
        for place, values in zip(x, cells, strict=True):
            dots(ax, [place] * len(values), values, style["color"], 4, 0.35, style["marker"])
        line_with_band(ax, x, means, halves, label=name, **style)
    reference(ax, arms.scale * sum(arms.dense) / len(arms.dense), "dense")
    ax.set_xticks(range(len(arms.levels)), [arms.density(level) for level in arms.levels])
    label_lines(ax)
    titles(ax, "Rewinding: networks after training", "weights remaining", arms.heading)
    return figure
