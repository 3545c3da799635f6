"""Check columns of a table of runs for slips of unit and counting, before anything is fitted to them."""

import itertools

import numpy as np

from scaling.doctor import Finding, Verdict
from scaling.published import CHINCHILLA, EPOCH
from scaling.rows import PER_PARAMETER_AND_TOKEN, Rows

# No language model has a larger vocabulary: a uniform guess over it is the largest plausible loss.
LARGEST_VOCABULARY = 300_000
# A run of fewer parameters or tokens is an exercise; a table where most are is in another unit.
LEAST_SIZE = 1e4
# Medians of published tables in nats lie between 0.86 and 1.28 times Besiroglu et al.'s (2024) fit to the runs of
# Hoffmann et al. (2022), see docs/fits.md; bits are 1.44 times nats.
YARDSTICK = 1.35
# Ratio of neighboring sizes, in a table in one unit, that is larger than any of the published tables'.
MIXED = 200.0
# A setting is of a full column.
CELLS = "Write it behind each of these numbers, as in 1.2B."
TO_NATS = "bits? Multiply them by ln 2: --config.units.loss=0.693147"


def _finding(name: str, text: str, fine: str, **numbers: int | float) -> Finding:
    return Finding(name, "warning" if text else "fine", text or fine, numbers)


def counted_flops(rows: Rows) -> Finding:
    """Compare the column flops with 6 x params x tokens."""
    ratio = rows["flops"] / (PER_PARAMETER_AND_TOKEN * rows["params"] * rows["tokens"])
    low, middle, high = (float(x) for x in np.percentile(ratio, [0, 50, 100]))
    numbers = {"least": low, "median": middle, "largest": high}
    if high - low < 1e-6 and abs(middle - 1) < 1e-6:
        return Finding("counted FLOPs", "fine", "FLOPs are 6 x params x tokens.", numbers)
    text = f"FLOPs over 6 x params x tokens lie between {low:.3g} and {high:.3g} (median {middle:.3g})"
    if 0.5 < middle < 2 and high < 3 * low:
        verdict: Verdict = "note" if high > 1.1 or low < 0.9 else "fine"
        text += "; optima are for C = 6 N D, so budgets as counted in the table lie off by that factor."
        return Finding("counted FLOPs", verdict, text, numbers)
    text += ": is one of them in another unit, or counted otherwise (no embeddings, forward pass only)? "
    text += "--config.units.COLUMN=FACTOR multiplies a column."
    return Finding("counted FLOPs", "warning", text, numbers)


def size_units(rows: Rows) -> Finding:
    """Find params or tokens that look like millions or billions."""
    texts, numbers = [], {}
    for name in ("params", "tokens"):
        middle = numbers[name] = float(np.median(rows[name]))
        if middle < LEAST_SIZE:
            unit, factor = ("billions", "1e9") if name == "tokens" or middle < 10 else ("millions", "1e6")
            text = f"Half of the runs have {middle:.3g} {name} or fewer: are they in {unit}? Counts are wanted; "
            texts.append(text + f"--config.units.{name}={factor} multiplies them.")
    return _finding("units of sizes", " ".join(texts), "Params and tokens look like counts.", **numbers)


def mixed_units(rows: Rows) -> Finding:
    """Find params or tokens of which only some are in thousands, millions or billions.

    Sizes, or FLOPs over 6 x params x tokens, of a table in one unit leave no gap of MIXED; those in two do. Where the
    sizes of both parts overlap, losses tell: part of the rows lie below what Hoffmann et al.'s runs have at their
    sizes, and about as far from it as the others once params or tokens are multiplied by 1e3, 1e6 or 1e9.

    Example:
      >>> import scaling
      >>> from scaling.plausible import mixed_units
      >>> rows = scaling.make_rows({"params": [1e8, 200, 4e8, 800], "tokens": [1e10] * 4, "loss": [3.3, 3.1, 3.0, 2.9]})
      >>> mixed_units(rows).verdict
      'warning'
    """
    ratio = rows["flops"] / (PER_PARAMETER_AND_TOKEN * rows["params"] * rows["tokens"])
    looked_at = {"params": rows["params"], "tokens": rows["tokens"], "FLOPs over 6 x params x tokens": ratio}
    for name, values in looked_at.items():
        low, factor = _below_gap(values)
        if factor > MIXED:
            few = low if 2 * low.sum() <= len(rows) else ~low
            text = f"{name}: {int(low.sum())} of {len(rows)} rows are below the others by a factor of {factor:.2g} or "
            text += f"more, with none between ({rows.places(np.flatnonzero(few))}): is part of a column in thousands, "
            return Finding("mixed units", "warning", text + f"millions or billions? {CELLS}", {"rows": int(few.sum())})
    if len(rows) > 3:

        def over_published(**moved: np.ndarray) -> np.ndarray:
            features = CHINCHILLA.gather(Rows({**rows.columns, **moved}))
            return np.log(rows["loss"]) - CHINCHILLA.predict(CHINCHILLA.raw(EPOCH)[:, None], features)[:, 0]

        here = over_published()
        low, gap = _below_gap(np.exp(here))
        for name, unit in itertools.product(("params", "tokens"), (1e3, 1e6, 1e9)) if gap > YARDSTICK else ():
            there = over_published(**{name: np.where(low, unit * rows[name], rows[name])})
            if abs(np.median(there[low]) - np.median(there[~low])) < np.log(YARDSTICK) and np.ptp(there) < np.ptp(here):
                text = f"{name}: {int(low.sum())} of {len(rows)} losses are those of {unit:.0e} times their {name} "
                text += f"({rows.places(np.flatnonzero(low))}): are these in another unit? {CELLS}"
                return Finding("mixed units", "warning", text, {"rows": int(low.sum())})
    return Finding("mixed units", "fine", "Every column looks to be in one unit.", {"rows": 0})


def _below_gap(values: np.ndarray) -> tuple[np.ndarray, float]:
    """The values below the widest gap between neighboring ones, by ratio, and that ratio."""
    ordered = np.sort(values)
    if len(ordered) < 2:
        return np.zeros(len(values), bool), 1.0
    ratios = ordered[1:] / ordered[:-1]
    i = int(np.argmax(ratios))
    return values <= ordered[i], float(ratios[i])


def loss_unit(rows: Rows, vocabulary: int = 0) -> Finding:
    """Find losses that are no nats per token: perplexities, bits, or runs that learned nothing.

    Losses above ln(vocabulary) are worse than a uniform guess. Below it, the median over the runs of language-model
    size is compared with the published fit of Hoffmann et al.'s runs: tables in nats lie within a factor of YARDSTICK
    of it, whatever their text (docs/fits.md).

    Args:
      rows: the runs.
      vocabulary: number of tokens; 0 if it is not known.
    """
    loss, most = rows["loss"], float(np.log(vocabulary or LARGEST_VOCABULARY))
    over = np.flatnonzero(loss > most)
    numbers = {"above": len(over), "largest": float(loss.max()), "ln_vocabulary": most}
    ratio, guess = 1.0, "perplexities? Take their logarithm"
    usual = np.flatnonzero((rows["params"] > 1e7) & (rows["tokens"] > 1e8))
    if 2 * len(usual) >= len(rows):
        features = CHINCHILLA.gather(rows.take(usual))
        law = np.exp(CHINCHILLA.predict(CHINCHILLA.raw(EPOCH)[:, None], features)[:, 0])
        ratio = numbers["over_published"] = float(np.median(loss[usual] / law))
        as_nats = {
            guess: float(np.median(np.log(np.maximum(loss[usual], 1.001)) / law)),
            TO_NATS: ratio * np.log(2),
        }
        guess = min(as_nats, key=lambda name: abs(np.log(as_nats[name])))
    text = f"The median loss is {ratio:.2f} times that of Hoffmann et al.'s runs at these sizes"
    if len(over):
        named = f"{vocabulary:,}" if vocabulary else f"any vocabulary (of {LARGEST_VOCABULARY:,}, say)"
        text = f"{len(over)} of {len(rows)} losses {'is' if len(over) == 1 else 'are'} above a uniform guess over "
        text += f"{named}, ln = {most:.2f} nats"
        gap = loss[over].min() / loss[loss <= most].max(initial=1e-9)
        # Of losses in bits many are above, or the rest are higher than in nats; a single one is a run that failed.
        single = len(usual) and ratio <= YARDSTICK and len(over) < 0.1 * len(rows)
        if vocabulary and loss.max() <= np.log2(vocabulary) and not single:
            text += f": {TO_NATS}."
        elif not single and (np.median(loss) > most or gap < 1.5):  # diverged runs stand apart from the others
            text += f": {guess}."
        else:
            text += f" ({rows.places(over)}): {'this run has' if len(over) == 1 else 'these runs have'} "
            text += f"learned nothing, or diverged; leave {'it' if len(over) == 1 else 'them'} out."
        return Finding("unit of loss", "warning", text, numbers)
    if ratio > YARDSTICK:
        return Finding("unit of loss", "warning", f"{text}: {guess}.", numbers)
    if ratio < 1 / YARDSTICK:
        return Finding("unit of loss", "note", f"{text}: is it per byte? Nats per token are wanted.", numbers)
    fine = f"All losses are under ln({vocabulary}) = {most:.2f}." if vocabulary else "Losses look like nats per token."
    return Finding("unit of loss", "fine", fine, numbers)


def doubled_rows(rows: Rows) -> Finding:
    """Find rows that are there more than once: same sizes, same loss."""
    keys = np.stack([rows[name] for name in ("params", "tokens", "loss")], 1)
    first = np.unique(keys, axis=0, return_index=True)[1]
    again = np.setdiff1d(np.arange(len(rows)), first)
    text = (
        f"{len(again)} of {len(rows)} rows have sizes and loss of an earlier one ({rows.places(again)}): a run that is "
    )
    text += "there twice makes intervals too narrow."
    return _finding("doubled rows", text if len(again) else "", "No row is there twice.", rows=len(again))


def examine_rows(rows: Rows, vocabulary: int = 0) -> list[Finding]:
    """Run all checks of a table's columns.

    Args:
      rows: the runs.
      vocabulary: number of tokens, for the largest plausible loss; 0 if it is not known.

    Example:
      >>> import scaling
      >>> rows = scaling.make_rows({"params": [1e9, 2e9], "tokens": [20.0, 40.0], "loss": [3.0, 2.8]})
      >>> [finding.name for finding in scaling.examine_rows(rows) if finding.verdict == "warning"]
      ['units of sizes']
    """
    found = [size_units(rows), mixed_units(rows), loss_unit(rows, vocabulary), doubled_rows(rows)]
    if not rows.completed:  # else FLOPs are 6 x params x tokens because they were computed so
        found.insert(0, counted_flops(rows))
    return [*(Finding("units read", "note", note, {}) for note in rows.notes), *found]
