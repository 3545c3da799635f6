"""Several arms trained over the same seeds: what their runs wrote, as tables, figures and sections of a report.

A run is a directory of `scripts/train.py`. Arms are compared by the validation loss after the last step, paired by
seed; of routed arms also the balance of the load, and whether seeds agree on which expert serves which byte.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lottery.summary import interval
from moe.specialization import agreement, mutual_information
from scaling.flops import Shape, exact_matmuls, parameters
from tessera.infra.logger import METRICS, TIMING, read_rows
from tessera.reports import comparison_figures
from tessera.reports.html import Section, Table, paragraphs
from tessera.reports.router import SPECIALISATION, load_history

# Bytes seen less often than this say little about who serves them.
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
    rows: Sequence[Mapping[str, Any]]
    table_LVE: np.ndarray | None

    @property
    def loss(self) -> float:
        """Validation loss after the last step, nats per token."""
        return [row for row in self.rows if row["kind"] == "eval"][-1]["loss"]


def finished(workdir: Path) -> bool:
    """Whether a run came to its end: its report is written last."""
    return (workdir / "report.html").exists()


def read_run(workdir: Path, arm: str, seed: int) -> Run:
    """Read what a finished run wrote."""
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    path = workdir / SPECIALISATION
    table = np.array(json.loads(path.read_text(encoding="utf-8"))["bytes"], float) if path.exists() else None
    return Run(arm, seed, config, [*read_rows(workdir / METRICS), *read_rows(workdir / TIMING)], table)


def arms(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of every arm, in order of appearance."""
    return {arm: [run for run in runs if run.arm == arm] for arm in dict.fromkeys(run.arm for run in runs)}


def shape(config: Mapping[str, Any]) -> Shape:
    """Sizes for `scaling.flops` of a run whose layers are all alike.

    Raises:
      ValueError: routed layers among dense ones.
    """
    model, moe = config["model"], config["model"].get("moe", {})
    routed = model.get("mlp") == "routed"
    if routed and (moe["every"] > 1 or moe["shared"]):
        raise ValueError("FLOPs of layers that differ, or of shared experts, are not counted here")
    dense = model["ff"] or -(-8 * model["width"] // (3 * 64)) * 64
    return Shape(
        layers=model["layers"],
        width=model["width"],
        ff=(moe["ff"] or dense // moe["granularity"]) if routed else dense,
        heads=model["heads"],
        kv_heads=model["kv_heads"],
        head_dim=model["head_dim"] or model["width"] // model["heads"],
        vocab=config["data"]["vocab_size"],
        length=config["length"],
        gated=True,
        tied=model["tied"],
        experts=moe["router"]["experts"] if routed else 1,
        active_experts=moe["router"]["k"] if routed else 1,
    )


def summary(run: Run) -> dict[str, Any]:
    """One line of a table of all runs."""
    speed = [row["tokens_per_second"] for row in run.rows if row["kind"] == "time" and "tokens_per_second" in row]
    return {"arm": run.arm, "seed": run.seed, "validation_loss": run.loss} | {
        "parameters": parameters(shape(run.config)).total,
        "flops_per_token": exact_matmuls(shape(run.config)) / run.config["length"],
        "tokens_per_second": float(np.median(speed)) if speed else None,
    }


def loss_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per arm: weights, training FLOPs per token, mean validation loss, its 95% interval, its lowest and highest."""
    table = []
    for arm, members in arms(runs).items():
        mean, half, n = interval(run.loss for run in members)
        one = summary(members[0])
        table.append({"arm": arm, "weights": one["parameters"], "kFLOPs per token": one["flops_per_token"] / 1e3})
        table[-1] |= {"mean": mean, "± (95%)": half, "lowest": min(run.loss for run in members)}
        table[-1] |= {"highest": max(run.loss for run in members), "seeds": n}
    return table


def difference_rows(runs: Sequence[Run], against: str) -> list[dict[str, Any]]:
    """Per other arm: mean over seeds of its loss less that of `against` with the same seed, and the 95% interval."""
    reference = {run.seed: run.loss for run in runs if run.arm == against}
    table = []
    for arm, members in arms(runs).items():
        pairs = [run.loss - reference[run.seed] for run in members if run.seed in reference]
        if arm != against and pairs:
            mean, half, n = interval(pairs)
            table.append({"arm": arm, "difference": mean, "± (95%)": half, "least": max(pairs), "seeds": n})
    return table


def late_load(run: Run) -> np.ndarray:
    """Mean load [L, E] (shares of the choices) over the last tenth of the logged steps."""
    load_SLE = load_history(run.rows)[1]
    return load_SLE[-max(1, len(load_SLE) // 10) :].mean(0)


def balance_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per routed arm, over seeds and layers: busiest and idlest expert, experts in use, share that hardly works.

    Loads are over the balanced load. Experts in use are exp(entropy of the load): E at perfect balance.
    """
    table = []
    for arm, members in arms(runs).items():
        if all(run.table_LVE is None for run in members):
            continue
        load_SLE = np.stack([late_load(run) for run in members])
        experts = load_SLE.shape[2]
        table.append({"arm": arm, "busiest": float(load_SLE.max(2).mean() * experts)})
        table[-1] |= {"idlest": float(load_SLE.min(2).mean() * experts)}
        table[-1] |= {"experts in use": float(comparison_figures.in_use(load_SLE).mean()), "of": experts}
        table[-1] |= {"below a tenth of its share": float((load_SLE * experts < 0.1).mean())}
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
            table.append({"arm": arm, "layer": layer + 1, "information": information, "agreement": matched})
            table[-1] |= {"± (95%)": half, "chance": float(np.mean([pair.chance for pair in pairs]))}
    return table


def sections(runs: Sequence[Run], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Section]:
    """The report: losses, load, specialisation, and the tables by their titles."""
    by_arm = arms(runs)
    routed = {arm: members for arm, members in by_arm.items() if members[0].table_LVE is not None}
    first = next(iter(runs)).config
    tokens = first["steps"] * first["batch_size"] * first["length"]
    lead = (
        f"{len(by_arm)} arms ({', '.join(by_arm)}) with {len(runs) // len(by_arm)} seeds each, "
        f"{first['steps']:,} steps of {first['batch_size']} x {first['length']} tokens ({tokens:,} tokens) of "
        f"{first['data']['name']}. Runs of a seed see the same tokens in the same order."
    )
    parts = [
        Section("", paragraphs(lead)),
        Section("Validation loss", comparison_figures.losses(by_arm), comparison_figures.LOSSES),
    ]
    if routed:
        parts.append(Section("Balance", comparison_figures.balance(routed, list(by_arm)), comparison_figures.BALANCE))
        parts.append(Section("Load maps", comparison_figures.load_maps(routed), comparison_figures.LOAD_MAPS))
    for title, rows in tables.items():
        if rows:
            parts.append(Section(title, Table(tuple(rows[0]), [tuple(row.values()) for row in rows])))
    return parts
