"""Tables and figures of arms over seeds, from rows made here."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from configs import moe_vs_dense
from scaling.flops import parameters
from sharding.rules import path_name
from tessera.cli.compare import SCHEMA
from tessera.infra.config import build
from tessera.infra.schema import completed
from tessera.models.transformer import TransformerConfig, param_shapes
from tessera.reports import comparison
from tessera.reports.comparison import Run
from tessera.reports.html import Section

LOSSES = {"dense": [1.50, 1.52, 1.51], "moe": [1.40, 1.44, 1.42], "unbalanced": [1.45, 1.46, 1.44]}


def settings(arm):
    config = completed(SCHEMA, moe_vs_dense.get_config())
    run = config.run.copy_and_resolve_references()
    run.update(config.arms[arm])
    return json.loads(run.to_json())


def make_run(arm, seed):
    """Ten logged steps. Unbalanced: at the end one expert takes a half, and the last five nothing."""
    rng = np.random.default_rng(seed)
    rows = [{"step": s, "kind": "eval", "loss": LOSSES[arm][seed] + 0.1 * (10 - s)} for s in (5, 10)]
    rows += [{"step": s, "kind": "time", "tokens_per_second": 100.0 + s} for s in range(1, 11)]
    load = np.full(16, 1 / 16)
    if arm == "unbalanced":
        load = np.array([0.5] + [0.05] * 10 + [0.0] * 5)
    table = None
    if arm != "dense":
        loads = [*np.eye(16)[:9], load]  # a table shows the last tenth
        rows += [{"step": s, "kind": "train", "router/load": [x.tolist()] * 4} for s, x in enumerate(loads, 1)]
        order = rng.permutation(16)
        profile = np.random.default_rng(7).dirichlet(np.full(16, 0.2), 256)
        table = np.round(1000 * profile[None, :, order].repeat(4, 0))
        if arm == "unbalanced":
            table = rng.integers(0, 1000, (4, 256, 16)).astype(float)
    return Run(arm, seed, settings(arm), rows, table)


RUNS = [make_run(arm, seed) for seed in range(3) for arm in LOSSES]


def test_losses_and_paired_differences():
    rows = {row["arm"]: row for row in comparison.loss_rows(RUNS)}
    assert rows["dense"]["mean"] == pytest.approx(1.51) and rows["dense"]["seeds"] == 3
    half = stats.t.ppf(0.975, 2) * np.std(LOSSES["moe"], ddof=1) / np.sqrt(3)
    assert rows["moe"]["± (95%)"] == pytest.approx(half)
    assert (rows["moe"]["lowest"], rows["moe"]["highest"]) == (1.40, 1.44)
    paired = {row["arm"]: row for row in comparison.difference_rows(RUNS, "dense")}
    assert set(paired) == {"moe", "unbalanced"}
    assert paired["moe"]["difference"] == pytest.approx(-0.09) and paired["moe"]["highest"] == pytest.approx(-0.08)


def test_the_answer_says_who_ends_lower_by_how_much_and_whether_that_is_known():
    moe, unbalanced = comparison.findings(RUNS, "dense")
    assert re.search(r"lower than dense's by 0\.0900 ± 0\.0248 nats per token \(95% interval, 3 seeds\)", moe), moe
    few = comparison.findings([run for run in RUNS if run.seed < 2], "dense")
    assert "±" not in few[0] and "2 seeds have no interval" in few[0]
    assert all(row["± (95%)"] is None for row in comparison.loss_rows([run for run in RUNS if run.seed < 2]))
    equal = [replace(run, rows=[{**row, "loss": 1.5 + 0.01 * run.seed * (run.arm == "moe") * (-1) ** run.seed}
             for row in run.rows]) for run in RUNS]  # fmt: skip
    assert "not told apart" in comparison.findings(equal, "dense")[0]


def test_the_arms_cost_the_same_and_the_dense_one_no_less():
    flops = {arm: comparison.summary(make_run(arm, 0))["flops_per_token"] for arm in LOSSES}
    assert flops["moe"] == flops["unbalanced"] <= flops["dense"] < 1.005 * flops["moe"]


@pytest.mark.parametrize(("ff", "granularity", "width"), [(0, 4, 4), (0, 2, 8), (6, 4, 6)])
def test_the_width_of_fine_grained_experts_is_theirs(ff, granularity, width):
    run = next(run for run in RUNS if run.arm == "moe")
    moe = {**run.config["model"]["moe"], "ff": ff, "granularity": granularity}
    model = {**run.config["model"], "ff": 16, "moe": moe}
    assert comparison.shape({**run.config, "model": model}).ff == width


def test_balance():
    rows = {row["arm"]: row for row in comparison.balance_rows(RUNS)}
    assert set(rows) == {"moe", "unbalanced"}
    assert rows["moe"]["busiest"] == pytest.approx(1) and rows["moe"]["experts in use"] == pytest.approx(16)
    found = rows["unbalanced"]
    assert (found["busiest"], found["least used"]) == (8, 0) and found["below a tenth of its share"] == 5 / 16
    assert found["experts in use"] == pytest.approx(np.exp(stats.entropy([0.5] + [0.05] * 10)))


def test_stability_tells_renamed_experts_from_random_ones():
    rows = comparison.stability_rows(RUNS)
    assert len(rows) == 8
    for row in rows:
        if row["arm"] == "moe":
            assert row["agreement"] == pytest.approx(1, abs=1e-3) and row["chance"] < 0.5
        else:
            assert abs(row["agreement"] - row["chance"]) < 0.1
    assert comparison.stability_rows(RUNS[:3]) == []  # one seed
    # A byte that one seed hardly saw is left out of the agreement of both.
    first, second, *_ = (run for run in RUNS if run.arm == "moe" and run.table_LVE is not None)
    rare = second.table_LVE.copy()
    rare[:, ::2] = np.random.default_rng(0).permuted(rare[:, ::2], axis=-1) * 0.01
    seen = rare.sum(-1)[0]
    assert (seen[::2] < comparison.LEAST_SEEN).all() and (seen[1::2] >= comparison.LEAST_SEEN).sum() > 2
    found = comparison.stability_rows([first, replace(second, table_LVE=rare)])
    assert all(row["agreement"] == pytest.approx(1, abs=1e-2) for row in found)


def test_the_report_has_every_table_and_figure():
    tables = {"Losses": comparison.loss_rows(RUNS), "None": []}
    sections = comparison.sections(RUNS, tables, "dense")
    assert [section.title for section in sections] == ["", "Validation loss", "Balance", "Load maps", "Numbers"]
    assert sections[-1].parts()[0] == "<h3>Losses</h3>" and len(sections[-1].parts()) == 2
    assert all(isinstance(section, Section) for section in sections)
    assert all(isinstance(section.parts()[0], Figure) for section in sections[1:4])
    dense_only = [run for run in RUNS if run.arm == "dense"]
    assert [section.title for section in comparison.sections(dense_only, {}, "dense")] == ["", "Validation loss"]


def test_a_runs_sizes_are_those_of_its_parameters():
    """Dense layers among routed ones, shared experts and latents: weights of the matrices against the decoder's own."""
    config = settings("moe")
    config["model"] |= {"layers": 5}
    config["model"]["moe"] |= {"every": 2, "first_k_dense_replace": 1, "shared": 1, "latent": 8}
    model = build(TransformerConfig, config["model"], "model", vocab_size=config["data"]["vocab_size"])
    leaves = jax.tree.leaves_with_path(param_shapes(model))
    matrices = sum(leaf.size for path, leaf in leaves if path_name(path).endswith(("kernel", "table")))
    assert parameters(comparison.shape(config)).total == matrices
    config["model"]["moe"]["null"] = 1
    with pytest.raises(ValueError, match="zero-computation experts"):
        comparison.shape(config)


def test_adapters_skip_the_weights_gradients_and_a_teacher_adds_a_forward_pass():
    plain = settings("dense")
    assert plain["lora"]["rank"] == 0 and plain["distill"]["weight"] == 0
    full = comparison.flops_per_token(plain)
    for lora, weight, thirds in ((8, 0.0, 2), (0, 0.5, 4), (8, 0.5, 3)):
        config = plain | {"lora": plain["lora"] | {"rank": lora}, "distill": plain["distill"] | {"weight": weight}}
        assert comparison.flops_per_token(config) == pytest.approx(full * thirds / 3)
