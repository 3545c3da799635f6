"""Pages, parsed as a browser would: self-contained, well-formed, escaped, and saying what the rows say."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import Page, read

from tessera.infra.logger import Logger
from tessera.reports.curves import smooth
from tessera.reports.html import (
    Section,
    Table,
    config_section,
    figure_svg,
    page,
    paragraphs,
    table_html,
    table_of,
    write_number,
    write_report,
)
from tessera.reports.run_report import curves_section, lm_findings, lm_report, size_findings
from tessera.reports.style import canvas, titles


def draw():
    figure, (ax,) = canvas(width=4.0)
    ax.plot([0, 1, 2], [1, 3, 2])
    ax.imshow(np.eye(3), extent=(0, 2, 1, 3))
    titles(ax, "A <title>", x="steps", y="loss & more")
    return figure


def lm_workdir(path, steps=200, kinds=("train", "eval", "time")):
    """A run's directory as the training script leaves it."""
    config = {"batch_size": 4, "length": 16, "lr": 0.003, "data": {"name": "stdlib", "tokenizer": "bytes"}}
    config |= {"model": {"layers": 2, "width": 32, "heads": 4}, "optimizer": {"name": "adamw"}}
    (path / "config.json").write_text(json.dumps(config))
    with Logger(path) as logger:
        for step in range(10, steps + 1, 10):
            if "train" in kinds:
                logger.write(step, {"loss": 5 * step**-0.3, "grad_norm": 1 / step, "lr": 0.003})
            if "time" in kinds:
                logger.write(step, {"steps_per_second": 10.0}, kind="time")
            if "eval" in kinds and step % 50 == 0:
                logger.write(step, {"loss": 2.0 if step == 150 else 2.5, "accuracy": 0.5}, kind="eval")
    return path


def test_a_page_is_well_formed_self_contained_and_escaped(tmp_path):
    sections = [
        Section("", paragraphs("1 < 2 & so on")),
        Section("Curves & such", [draw(), draw()], caption="a <b> caption"),
        Section("A table", Table(["name", "x"], [["<script>", 1.0], ["b", float("nan")]])),
        Section("Folded", paragraphs("inside"), fold="open me"),
        Section("Folded", draw()),
    ]
    with pytest.raises(ValueError, match="two sections.*Folded"):
        page("twice", sections)
    found = read(write_report(tmp_path, "T & t", sections[:4], subtitle="<sub>"))
    for words in ("T & t", "1 < 2 & so on", "a <b> caption", "A <title>", "loss & more", "open me", "<sub>"):
        assert words in found.text
    assert found.tables == [[["name", "x"], ["<script>", "1.000"], ["b", "–"]]]
    images = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert images == ["curves-such-1.png", "curves-such-2.png", "report.html", "tables.md"]
    written = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert written == "**A table**\n\n| name | x |\n|---|---|\n| <script> | 1.000 |\n| b | – |\n"
    assert (tmp_path / "figures" / "curves-such-1.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_report_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
        lm_report(lm_workdir(tmp_path / name / "run"))
    files = [sorted(p for p in (tmp_path / name).rglob("*") if p.suffix in (".html", ".png")) for name in ("a", "b")]
    assert len(files[0]) == 3 and [p.name for p in files[0]] == [p.name for p in files[1]]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_figures_follow_the_readers_color_scheme():
    text = figure_svg(draw(), "p", "a figure")
    assert "var(--ink)" in text and "var(--grid)" in text and "#1f2933" not in text
    document = page("t", [Section("f", draw())])
    declared = set(re.findall(r"(--[a-z0-9]+):", document))
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", document)) <= declared
    assert "prefers-color-scheme: dark" in document


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (math.nan, "–"),
        (3, "3"),
        ("a", "a"),
        (True, "True"),
        (0.0, "0.000"),
        (0.5, "0.5000"),
        (97.4, "97.40"),
        (1234.0, "1234"),
        (1e-5, "1e-5"),
        (2.5e9, "2.5e9"),
        (math.inf, "inf"),
    ],
)
def test_numbers_in_cells(value, text):
    assert write_number(value) == text


@given(st.lists(st.lists(st.text() | st.integers() | st.floats() | st.none(), min_size=2, max_size=2), max_size=4))
def test_any_cell_survives_as_text(rows):
    found = Page(table_html(Table(["a", "b"], rows))).tables[0]
    assert found[1:] == [[write_number(value) for value in row] for row in rows]


def test_cells_of_a_table_with_sentences_name_their_columns_for_narrow_screens():
    page = table_html(Table(["what", "a <b>"], [["x", "y"], ["z", "a sentence " * 10]]))
    assert '<table class="prose">' in page and page.count('data-column="a &lt;b&gt;"') == 2
    assert "data-column" not in table_html(Table(["what", "a <b>"], [["x", "y"]]))


@given(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), min_size=1, max_size=40), st.sampled_from([1, 3, 5, 9]))
def test_smoothing_is_the_mean_of_the_finite_values_around(values, window):
    got = smooth(np.array(values), window)
    half = window // 2
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        assert got[i] == pytest.approx(np.mean(near), abs=1e-6) if near else math.isnan(got[i])


def test_tables_take_rows_with_different_keys():
    table = table_of([{"a_b": 1}, {"a_b": 2, "c": np.float64(0.5), "d": [1]}])
    assert Page(table_html(table)).tables == [[["a b", "c", "d"], ["1", "–", "–"], ["2", "0.5000", "[1]"]]]


def test_settings_are_listed_with_dotted_names_and_folded(tmp_path):
    assert "No config.json" in config_section(tmp_path).content
    (tmp_path / "config.json").write_text(json.dumps({"lr": 1e-3, "data": {"dir": "", "list": [1, 2]}}))
    (tmp_path / "versions.json").write_text(json.dumps({"jax": "0.11.0"}))
    found = read(write_report(tmp_path, "t", [config_section(tmp_path)]))
    assert found.tables[0][1:] == [["data.dir", '""'], ["data.list", "[1, 2]"], ["lr", "0.001"]]
    assert found.tables[1][1:] == [["jax", "0.11.0"]]


def test_language_model_report_says_what_the_rows_say(tmp_path):
    found = read(lm_report(lm_workdir(tmp_path)))
    for words in (
        "(2 layers, 32 wide, 4 heads) was trained for 200 steps of 4 x 16 tokens, 12,800 tokens in all",
        f"ended at 2.5000 nats per token (perplexity {math.exp(2.5):.2f}, {2.5 / math.log(2):.3f} bits per byte)",
        "lowest at step 150: 2.0000",
        "a median of 640 tokens per second",
        "no interval",
    ):
        assert words in found.text
    assert [row[0] for row in found.tables[0]] == ["step", "50", "100", "150", "200"]
    for title in ("Gradient norm", "Learning rate", "Throughput", "validation"):
        assert title in found.text


def test_a_routed_run_says_its_experts_parameters_and_flops_and_what_its_text_is():
    """The numbers by hand: 2 layers of width 8, 4 experts of ff 16, two a token, vocabulary 32, no grouped queries."""
    router = {"name": "top_k", "experts": 4, "k": 2}
    moe = {"router": router, "every": 1, "ff": 16, "granularity": 1, "shared": 0}
    model = {"layers": 2, "width": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "ff": 0, "mlp": "routed", "tied": True}
    config = {"model": model | {"moe": moe}, "length": 4, "vocab_size": 32, "data": {"name": "stdlib"}}
    first, text = size_findings(config, tokens=1000)
    total = 32 * 8 + 2 * (4 * 8 * 8 + 4 * 3 * 8 * 16 + 8 * 4)
    used = total - 2 * 2 * 3 * 8 * 16
    assert f"{total:,} parameters in matrices, {used:,} of them used by a token" in first
    assert "4 experts in 2 of 2 layers, 2 of them for each token, chosen by the router 'top_k'" in first
    per_token = 6 * used + 3 * 2 * 2 * 2 * 2.5 * 8  # and scores and weighted values, 2.5 tokens seen on average
    assert f"{per_token * 1000:.3g}".replace("e+0", "e") in first and "source code" in text
    assert size_findings({"model": {"layers": 2}}, 10) == []


@pytest.mark.parametrize("kinds", [(), ("train",), ("eval",), ("time",), ("train", "eval")])
def test_language_model_report_of_a_run_with_little_in_it(tmp_path, kinds):
    found = read(lm_report(lm_workdir(tmp_path, steps=50, kinds=kinds)))
    assert ("No validation loss" in found.text) == ("eval" not in kinds)


def test_training_loss_leaves_the_z_term_out_and_the_test_loss_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with Logger(tmp_path) as logger:
        logger.write(1, {"loss": 3.5, "cross_entropy": 3.0})
        logger.write(1, {"loss": 3.25}, kind="eval")
    found = read(lm_report(tmp_path, {"loss": 2.75}))
    assert found.tables[0] == [["step", "training loss", "validation loss"], ["1", "3.000", "3.250"]]
    assert "last logged training loss (cross-entropy) is 3.0000" in found.text
    assert "On the test split the final weights reach 2.7500 nats per token" in found.text


def test_a_run_that_broke_says_so_and_still_draws(tmp_path):
    lm_workdir(tmp_path)
    with Logger(tmp_path) as logger:
        logger.write(207, {"loss": math.nan, "grad_norm": math.inf}, kind="failed")
        logger.write(207, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    assert "stopped at step 207" in read(lm_report(tmp_path)).text


def test_curves_of_long_runs_are_smoothed_and_say_so():
    rows = [{"step": step, "kind": "train", "loss": 1.0} for step in range(1, 401)]
    assert "centered mean over 11 rows" in curves_section(rows).caption
    assert "mean" not in curves_section(rows[:50]).caption
    assert "uniform guess over 256 symbols costs 5.5452" in " ".join(
        lm_findings([{"step": 1, "kind": "eval", "loss": 5.0}], [], {"model": {"vocab_size": 256}})
    )
