"""Several arms trained over the same seeds: what their runs wrote, as tables, figures and sections of a report.

A run is a directory of `scripts/train.py`. Arms are compared by the validation loss after the last step, paired by
seed; of routed arms also the balance of the load, and whether seeds agree on which expert each byte is routed to.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lottery.summary import interval
from moe.activations import GATED
from moe.specialization import agreement, mutual_information
from scaling.flops import Shape, exact_matmuls, parameters
from tessera.infra.logger import METRICS, TIMING, Rows, load_history, read_rows
from tessera.reports import style
from tessera.reports.curves import column
from tessera.reports.html import Section, bullets, paragraphs, table_of
from tessera.reports.router import SPECIALIZATION, load_maps
from tessera.reports.style import Axes, Figure, titles

FEW = 3  # seeds, with fewer of which Student's interval spans anything
# Bytes seen less often than this say little about which expert they are routed to.
LEAST_SEEN = 200


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
      arm, seed: which.
      config: its settings.
      rows: of `metrics.jsonl` and `timing.jsonl`.
      table_LVE: choices on held-out text by routed layer, byte read and expert; None for a run without.
    """

    arm: str
    seed: int
    config: Mapping[str, Any]
    rows: Rows
    table_LVE: np.ndarray | None

    @property
    def loss(self) -> float:
        """Validation loss after the last step, nats per token."""
        return [row for row in self.rows if row["kind"] == "eval"][-1]["loss"]


ByArm = Mapping[str, Sequence[Run]]


def finished(workdir: Path) -> bool:
    """Whether a run came to its end: its report is written last."""
    return (workdir / "report.html").exists()


def read_run(workdir: Path, arm: str, seed: int) -> Run:
    """Read what a finished run wrote."""
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    path = workdir / SPECIALIZATION
    table = np.array(json.loads(path.read_text(encoding="utf-8"))["bytes"], float) if path.exists() else None
    return Run(arm, seed, config, [*read_rows(workdir / METRICS), *read_rows(workdir / TIMING)], table)


def arms(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of every arm, in order of appearance."""
    return {arm: [run for run in runs if run.arm == arm] for arm in dict.fromkeys(run.arm for run in runs)}


def routed_arms(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of every arm that has experts."""
    return {arm: members for arm, members in arms(runs).items() if any(run.table_LVE is not None for run in members)}


def shape(config: Mapping[str, Any]) -> Shape:
    """Sizes for `scaling.flops` of a run.

    Raises:
      ValueError: zero-computation experts, or latent attention.
    """
    model, moe = config["model"], config["model"].get("moe", {})
    routed = model.get("mlp") == "routed"
    if routed and (moe.get("identity") or moe.get("null")):
        raise ValueError("FLOPs of zero-computation experts (moe.identity, moe.null) depend on the data")
    if model.get("latent", {}).get("kv_rank"):
        raise ValueError("FLOPs and weights of latent attention (latent.kv_rank) are not counted")
    window = model.get("window", 0)  # runs from before there was one
    letters = model.get("attention_pattern") or ("L" if window else "G")
    dense = model["ff"] or -(-8 * model["width"] // (3 * 64)) * 64
    first, gated = moe.get("first_k_dense_replace", 0), True
    plain = model["layers"] - (model["layers"] - first) // moe["every"] if routed else 0
    if routed:
        gated = moe.get("mixture", {}).get("activation", "swiglu") in GATED
    return Shape(
        layers=model["layers"],
        width=model["width"],
        ff=(moe["ff"] or dense // moe["granularity"]) if routed else dense,
        heads=model["heads"],
        kv_heads=model["kv_heads"],
        head_dim=model["head_dim"] or model["width"] // model["heads"],
        vocab=config.get("vocab_size") or config["data"]["vocab_size"],
        length=config["length"],
        gated=gated,
        tied=model["tied"],
        experts=moe["router"]["experts"] if routed else 1,
        active_experts=moe["router"]["k"] if routed else 1,
        shared_experts=moe["shared"] if routed else 0,
        latent=moe.get("latent", 0) if routed else 0,
        dense_layers=plain,
        dense_ff=dense if plain else 0,
        window=window,
        local_layers=(letters * model["layers"])[: model["layers"]].count("L"),
    )


def flops_per_token(config: Mapping[str, Any]) -> float:
    """Training FLOPs per token of the matrix products of a run.

    With adapters the gradients of the model's own kernels, a third, are not computed (their own products, a few
    percent, are not counted); a teacher computes a forward pass more, counted as if it had the model's shape.
    """
    thirds = (2 if config.get("lora", {}).get("rank") else 3) + (
        1 if config.get("distill", {}).get("weight") or config.get("distill", {}).get("hidden") else 0
    )
    return exact_matmuls(shape(config)) / config["length"] * thirds / 3


def summary(run: Run) -> dict[str, Any]:
    """One line of a table of all runs."""
    speed = column(run.rows, "tokens_per_second", "time")[1]
    return {"arm": run.arm, "seed": run.seed, "validation_loss": run.loss} | {
        "parameters": parameters(shape(run.config)).total,
        "flops_per_token": flops_per_token(run.config),
        "tokens_per_second": float(np.median(speed)) if len(speed) else None,
    }


def loss_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per arm: weights, training FLOPs per token, mean validation loss, its 95% interval, its lowest and highest."""
    table = []
    for arm, members in arms(runs).items():
        one, losses = summary(members[0]), [run.loss for run in members]
        mean, half, n = interval(losses)
        cost = {"weights": f"{one['parameters']:,}", "kFLOPs per token": one["flops_per_token"] / 1e3}
        spread = {"mean": mean, "± (95%)": half if n >= FEW else None}
        ends = {"lowest": min(losses), "highest": max(losses), "seeds": n}
        table.append({"arm": arm} | cost | spread | ends)
    return table


def difference_rows(runs: Sequence[Run], against: str) -> list[dict[str, Any]]:
    """Per other arm: mean over seeds of its loss less that of `against` with the same seed, and the 95% interval."""
    reference = {run.seed: run.loss for run in runs if run.arm == against}
    table = []
    for arm, members in arms(runs).items():
        pairs = [run.loss - reference[run.seed] for run in members if run.seed in reference]
        if arm != against and pairs:
            mean, half, n = interval(pairs)
            known, ends = half if n >= FEW else None, {"lowest": min(pairs), "highest": max(pairs)}
            table.append({"arm": arm, "difference": mean, "± (95%)": known} | ends | {"seeds": n})
    return table


def findings(runs: Sequence[Run], against: str) -> list[str]:
    """Which arm ends lower than `against`, by how much and how surely, a sentence an arm."""
    texts = []
    for row in difference_rows(runs, against):
        arm, difference, half, n = row["arm"], row["difference"], row["± (95%)"], row["seeds"]
        word = "lower" if difference < 0 else "higher"
        by = f"{abs(difference):.4f}" + (f" ± {half:.4f}" if half is not None else "") + " nats per token"
        if half is None:
            seeds = "The one seed has" if n == 1 else f"{n} seeds have"
            how = f"{seeds} no interval; the differences lie between {row['lowest']:+.4f} and {row['highest']:+.4f}"
            texts.append(f"{arm}: the validation loss ends {word} than {against}'s by {by}. {how}.")
        elif abs(difference) > half:
            texts.append(f"{arm}: the validation loss ends {word} than {against}'s by {by} (95% interval, {n} seeds).")
        else:
            texts.append(
                f"{arm} and {against} are not told apart: {arm}'s validation loss ends {word} by {by}, {n} seeds."
            )
    return texts


def late_load(run: Run) -> np.ndarray:
    """Mean load [L, E] (shares of the choices) over the last tenth of the logged steps."""
    load_SLE = load_history(run.rows)[1]
    return load_SLE[-max(1, len(load_SLE) // 10) :].mean(0)


def in_use(load: np.ndarray) -> np.ndarray:
    """exp(entropy) along the last axis of shares."""
    logs = np.log(load, where=load > 0, out=np.zeros_like(load))
    return np.exp(-(load * logs).sum(-1))


def balance_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per routed arm, over seeds and layers: busiest and least used expert, experts in use, share hardly used.

    Loads are over the balanced load. Experts in use are exp(entropy of the load): E at perfect balance.
    """
    table = []
    for arm, members in routed_arms(runs).items():
        load_SLE = np.stack([late_load(run) for run in members])
        experts = load_SLE.shape[2]
        values = {
            "busiest": load_SLE.max(2).mean() * experts,
            "least used": load_SLE.min(2).mean() * experts,
            "experts in use": in_use(load_SLE).mean(),
            "of": experts,
            "below a tenth of its share": (load_SLE * experts < 0.1).mean(),
        }
        table.append({"arm": arm} | {name: np.asarray(value).item() for name, value in values.items()})
    return table


def stability_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per routed arm and layer: information of the byte about the expert, and how alike the seeds' experts are.

    `agreement` is the mean over pairs of seeds of the matched correlation, `chance` that of shuffled bytes; see
    `moe.specialization.agreement`.
    """
    table = []
    for arm, members in arms(runs).items():
        tables = [run.table_LVE for run in members if run.table_LVE is not None]
        for layer in range(len(tables[0]) if len(tables) > 1 else 0):
            counts = [one[layer] for one in tables]
            seen = np.min([one.sum(1) for one in counts], axis=0) >= LEAST_SEEN
            pairs = [agreement(a[seen], b[seen]) for a, b in itertools.combinations(counts, 2)]
            matched, half, _ = interval(pair.matched for pair in pairs)
            information = float(np.mean([mutual_information(one).normalized for one in counts]))
            row = {"arm": arm, "layer": layer + 1, "information": information, "agreement": matched}
            table.append(row | {"± (95%)": half, "chance": float(np.mean([pair.chance for pair in pairs]))})
    return table


def draw_arms(ax: Axes, lines: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], order: Sequence[str]) -> None:
    """Draw (steps, values) of every seed thin and their mean thick; an arm looks the same wherever it is in `order`."""
    for arm, pairs in lines.items():
        how = style.look(order.index(arm)) | ({"marker": ""} if len(pairs[0][0]) > 30 else {})
        for step, value in pairs:
            ax.plot(step, value, color=how["color"], linewidth=0.7, alpha=0.45)
        mean = np.mean([value for _, value in pairs], axis=0)
        style.line_with_band(ax, pairs[0][0], mean, label=arm, **how)
    style.steps_axis(ax)


def loss_figure(by_arm: ByArm) -> Figure:
    """Validation loss against step: the whole run, and its second half."""
    lines = {arm: [column(run.rows, "loss", "eval") for run in members] for arm, members in by_arm.items()}
    figure, axes = style.canvas(2, height=3.9)
    for ax, title in zip(axes, ("Whole run", "Second half"), strict=True):
        draw_arms(ax, lines, list(by_arm))
        titles(ax, title, x="training step", y="validation loss (nats per token)")
    last = max(step[-1] for pairs in lines.values() for step, _ in pairs)
    axes[1].set_xlim(last / 2, last * 1.01)
    style.zoom(axes[1], axes[1].get_lines(), last / 2)
    style.label_lines(axes[1])
    return figure


def balance_figure(by_arm: ByArm, order: Sequence[str]) -> Figure:
    """Busiest expert and experts in use against step; `order` holds all arms of the comparison, for their colors."""
    figure, axes = style.canvas(2)
    history = {arm: [load_history(run.rows) for run in members] for arm, members in by_arm.items()}
    experts = next(iter(history.values()))[0][1].shape[2]
    panels = (
        ("Busiest expert", "load over balanced load", lambda load: load.max(2).mean(1) * experts),
        ("Experts in use", f"of {experts}, exp(entropy of the load)", lambda load: in_use(load).mean(1)),
    )
    for ax, (title, unit, value) in zip(axes, panels, strict=True):
        draw_arms(ax, {arm: [(s, value(load)) for s, load in pairs] for arm, pairs in history.items()}, order)
        ax.set_ylim(0, None if ax is axes[0] else experts * 1.05)
        titles(ax, title, x="training step", y=unit)
    style.label_lines(axes[1])
    return figure


def load_figure(by_arm: ByArm) -> Figure:
    """Load over steps of the first seed of every arm, for its least balanced layer."""
    loads = {}
    for arm, (first, *_) in by_arm.items():
        late_LE = late_load(first)
        layer = int(in_use(late_LE).argmin())
        steps, load_SLE = load_history(first.rows)
        loads[f"{arm}, layer {layer + 1}"] = load_SLE[:, layer, np.argsort(late_LE[layer])]
    return load_maps(steps, loads, 0.6 + 1.7 * len(loads), quantile=0.995)


NUMBERS = (
    "Losses after the last step, on held-out text; with fewer than three seeds there is no interval. Weights are those "
    "of all experts. Loads are over the load at perfect balance, experts in use exp(entropy of the load). Information: "
    "the share of the choice of an expert that the byte read explains. Agreement: correlation of two seeds in what "
    "their experts are given, the experts matched as well as possible; chance is that of shuffled bytes."
)


def sections(runs: Sequence[Run], tables: Mapping[str, Rows], against: str) -> list[Section]:
    """The report: the answer, losses, load, and the tables under their titles."""
    by_arm, with_experts = arms(runs), routed_arms(runs)
    first = runs[0].config
    tokens = first["steps"] * first["batch_size"] * first["length"]
    lead = (
        f"{len(by_arm)} arms ({', '.join(by_arm)}) with {len(runs) // len(by_arm)} seeds each, "
        f"{first['steps']:,} steps of {first['batch_size']} x {first['length']} tokens ({tokens:,} tokens) of "
        f"{first['data']['name']}. Runs of a seed see the same tokens in the same order."
    )
    losses = (
        "Held-out text, the same for all runs. Thick: mean over seeds; thin: every seed. Right: the second half "
        "enlarged."
    )
    balance = (
        "Every logged batch, mean over layers. Thick: mean over seeds; thin: every seed. Experts in use are "
        "exp(entropy of the load): as many as there are at perfect balance, one when all tokens go to one."
    )
    maps = (
        "Share of the choices each expert got over the share at perfect balance, the first seed, the layer that ends "
        "furthest from balance. Experts upwards, in order of their load at the end."
    )
    answer = bullets(*findings(runs, against))
    parts = [Section("", paragraphs(lead) + answer), Section("Validation loss", partial(loss_figure, by_arm), losses)]
    if with_experts:
        parts.append(Section("Balance", partial(balance_figure, with_experts, list(by_arm)), balance))
        parts.append(Section("Load maps", partial(load_figure, with_experts), maps))
    numbers = [part for title, rows in tables.items() if rows for part in (f"<h3>{title}</h3>", table_of(rows))]
    return parts + [Section("Numbers", numbers, NUMBERS)] * bool(numbers)
