"""What a lottery search found, as plain sentences computed from its rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lottery.summary import DENSE
from tessera.reports.lottery_figures import Point, arm_name, arms, main_arm, paired_points, series

Rows = Sequence[Mapping[str, Any]]
ACCURACY, STOP = "early_stop_test_accuracy", "early_stop_step"
ROUNDING = 1e-9  # equal accuracies summed in another order may differ by this much


def matching(rows: Rows, value: str = ACCURACY) -> Point | None:
    """The sparsest level at which the main arm's mean is at least the dense network's: the paired difference there.

    None if there is no such level. The level is chosen by looking at the results, so its interval is that of a level
    picked among many.
    """
    found = [point for point in paired_points(rows, value, main_arm(rows), DENSE) if point.mean >= -ROUNDING]
    return found[-1] if found else None


def describe(rows: Rows, config: Mapping[str, Any]) -> str:
    """What was run, in a few sentences; `config` holds the settings of the script, any of which may be missing."""
    search, train, model = (config.get(name, {}) for name in ("search", "train", "model"))
    seeds, levels = len({row["seed"] for row in rows}), max(row["level"] for row in rows)
    last = min(rows, key=lambda row: row["density"])
    hidden = "-".join(str(size) for size in model.get("hidden", ()))
    kind = (
        f"fully connected {hidden} network" if hidden else f"{model['name']} network" if "name" in model else "network"
    )
    text = f"A {kind} of {last['prunable']:,} prunable weights was trained"
    text += f" for {_steps(train['steps'])}" if train.get("steps") else ""
    if config.get("optimizer", {}).get("name"):
        text += f" with {config['optimizer']['name']} (learning rate {config.get('lr', '?')}"
        text += f", batches of {train['batch_size']})" if train.get("batch_size") else ")"
    if not levels:
        return f"{text}, with {_count(seeds, 'seed')}. Nothing has been pruned yet."
    text += f", then pruned in {_count(levels, 'round')} down to {percent(last['density'])} ({last['alive']:,} weights)"
    text += f", with {_count(seeds, 'seed')}."
    text += _pruning_words(search, last.get("start_step", 0))
    controls = [arm_name(arm) for arm in arms(rows) if arm != main_arm(rows)]
    return text + (f" Compared with it: {', '.join(controls)}." if controls else "")


def _pruning_words(search: Mapping[str, Any], start: int) -> str:
    """What every round does."""
    back = f"their values at step {start:,}" if start else "their initial values"
    resets = f", sets the ticket's surviving weights back to {back} and trains again."
    unit = search.get("structure", "unstructured")
    by = f" by {search['score']}" if search.get("score") else ""
    by += f" in units of {unit}" if unit != "unstructured" else ""
    scope, falls = search.get("scope"), search.get("density") or search.get("schedule", "geometric") != "geometric"
    if scope in ("uniform", "erk") or falls:
        names = {"uniform": "every layer alike", "erk": "densities by ERK", "layer": "layer by layer"}
        how = names.get(str(scope), "over the whole network")
        return f" Every round prunes{by}, {how}, on a {search.get('schedule', 'geometric')} schedule{resets}"
    if not search.get("rate"):
        return ""
    text = f" Every round removes the lowest {search['rate']:.0%}{by}"
    text += " of each layer" if scope == "layer" else " of the network"
    output = search.get("output_rate", -1)
    output = search["rate"] / 2 if output < 0 else output
    other = [f"{rate:.0%} where {pattern!r} matches" for pattern, rate in search.get("rates", ())]
    other += [f"{output:.0%} of the output layer"] if search.get("output", "^output/") else []
    return text + (f" ({', '.join(other)})" if scope == "layer" and other else "") + resets


def findings(rows: Rows) -> str:
    """What came out, in a few sentences."""
    arm = main_arm(rows)
    dense = series(rows, ACCURACY).get(DENSE, [])
    if not dense:
        return "The dense network has no test accuracy, so nothing can be compared with it."
    return _matching_words(rows, arm, dense[0])


def caveats(rows: Rows) -> str:
    """How far the findings can be trusted: what the intervals say over all levels, and how they were made."""
    dense = series(rows, ACCURACY).get(DENSE, [])
    texts = [_clear_words(rows, main_arm(rows)), _caveat(rows, dense[0]) if dense else ""]
    return " ".join(text for text in texts if text)


def _matching_words(rows: Rows, arm: str, dense: Point) -> str:
    name, base = arm_name(arm), f"{percent(dense.mean)}{plus_minus(dense.half)}"
    differences = paired_points(rows, ACCURACY, arm, DENSE)
    if not differences:
        return f"The dense network reaches a test accuracy of {base} at early stopping."
    point = matching(rows)
    if point is None:
        near = max(differences, key=lambda p: p.mean)
        return (
            f"At no level is the {name} on average as accurate as the dense network ({base} at early stopping); it "
            f"comes nearest at {percent(near.density)} of the weights, {points(near)}."
        )
    own = next(p for p in series(rows, ACCURACY)[arm] if p.level == point.level)
    text = (
        f"Down to {percent(point.density)} of the weights the {name} is on average at least as accurate as the dense "
        f"network: {percent(own.mean)}{plus_minus(own.half)} against {base} at early stopping, a difference of "
        f"{points(point)}."
    )
    short = [p for p in differences if p.density > point.density and p.mean < -ROUNDING]
    if len(short) > 4:
        worst = -100 * min(p.mean for p in short)
        text += f" On the way it falls short at {len(short)} levels, by at most {worst:.2f} points."
    elif short:
        where = ", ".join(f"{percent(p.density)} ({signed(100 * p.mean)} points)" for p in short)
        text += f" It falls short on the way at {where}."
    leads = [
        f"{points(p)} over {arm_name(other)}"
        for other in arms(rows)
        if other != arm
        for p in paired_points(rows, ACCURACY, arm, other)
        if p.level == point.level
    ]
    text += f" Its lead there: {', '.join(leads)}." if leads else ""
    for p in paired_points(rows, STOP, arm, DENSE):
        if p.level == point.level:
            when = "earlier than" if p.mean < 0 else "later than" if p.mean > 0 else "apart from"
            known = f" (95% interval of the change {signed(p.mean - p.half, 0)} to {signed(p.mean + p.half, 0)})"
            text += f" Its validation loss is lowest {abs(p.mean):,.0f} steps {when} the dense network's"
            text += f"{known if np.isfinite(p.half) else ''}."
    return text


def _clear_words(rows: Rows, arm: str) -> str:
    """At how many levels the intervals leave no doubt, either way."""
    differences = [p for p in paired_points(rows, ACCURACY, arm, DENSE) if np.isfinite(p.half)]
    if not differences:
        return ""
    better = [p for p in differences if p.mean - p.half > 0]
    worse = [p for p in differences if p.mean + p.half < 0]
    text = f"Level by level, the 95% interval of {arm_name(arm)} minus dense is above zero at {len(better)}"
    text += f" (sparsest: {percent(better[-1].density)})" if better else ""
    text += f", below zero at {len(worse)}"
    text += f" (densest: {percent(worse[0].density)})" if worse else ""
    neither = len(differences) - len(better) - len(worse)
    return f"{text} and around zero at {neither} of {_count(len(differences), 'level')}."


def _caveat(rows: Rows, dense: Point) -> str:
    if dense.seeds < 2:
        return "One seed: there are no intervals, and differences of this size may be chance."
    if not arms(rows):
        return ""
    return (
        f"Intervals are 95% Student-t over {dense.seeds} seeds, differences are paired by seed; the level named above "
        "was picked after seeing all of them, so judge it together with its neighbours."
    )


def percent(fraction: float) -> str:
    """A fraction as a percentage; accuracies and large shares with one decimal, small shares with three digits."""
    value = 100 * fraction
    return f"{value:.0f}%" if np.isclose(value, 100) else f"{value:.1f}%" if value >= 10 else f"{value:#.3g}%"


def plus_minus(half: float) -> str:
    """The half-width of a fraction's interval in points, with a leading space; nothing if unknown."""
    return f" ± {100 * half:.1f}" if np.isfinite(half) else ""


def points(point: Point) -> str:
    """A difference of fractions in percentage points with its interval."""
    low, high = (signed(100 * (point.mean + sign * point.half)) for sign in (-1, 1))
    interval = f" (95% interval {low} to {high})" if np.isfinite(point.half) else ""
    return f"{signed(100 * point.mean)} points{interval}"


def signed(value: float, digits: int | None = None) -> str:
    """A number with its sign; by default two decimals below ten and one above."""
    digits = digits if digits is not None else 2 if abs(value) < 10 else 1
    return f"{value:+,.{digits}f}".replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _steps(value: Any) -> str:
    text = str(value)
    number = text.removesuffix("it").removesuffix("ep")
    unit = "epoch" if text.endswith("ep") else "step"
    return f"{int(number):,} {unit}s" if number.isdigit() else f"{text} steps"
