"""One page from any runs: what they are, what differs, and what is refused."""

import json

import pytest
from report_cases import make_rows, read

from lottery.summary import write_csv
from tessera.cli import report
from tessera.infra.workdir import FORMAT
from tessera.pages import runs


def make_run(path, settings, **files):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(settings))
    made = {"format": FORMAT, "command": f"tessera train --workdir={path.name}", "revision": "abcdef0123456789"}
    (path / "run.json").write_text(json.dumps(made | {"devices": 2, "device_kind": "cpu", "changed": False}))
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text)
    return str(path)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def training(path, lr, loss, **settings):
    rows = [{"step": step, "kind": "train", "loss": 5 - step / 10} for step in range(1, 11)]
    rows += [{"step": step, "kind": "eval", "loss": loss + 1 / step, "bits_per_byte": 2.5} for step in (5, 10)]
    whole = {"lr": lr, "steps": 10, "batch_size": 4, "length": 8, "model": {"width": 16}} | settings
    return make_run(path, whole, metrics_jsonl=lines(*rows))


def search(path, **how):
    rows = [
        {key: value for key, value in row.items() if key not in ("curve", "layers")}
        | {f"layers/{key}": value for key, value in row["layers"].items()}
        for row in make_rows(**how)
    ]
    found = make_run(path, {"search": {"levels": 4}})
    write_csv(rows, path / "tickets.csv")
    return found


def test_runs_side_by_side(tmp_path, capsys):
    paths = [training(tmp_path / "a" / "lm", 0.1, 1.0), training(tmp_path / "b" / "lm", 0.2, 1.25, seed=3)]
    paths += [search(tmp_path / "ticket")]
    fit = {
        "isoflop": {
            "rows": 9,
            "exponents": {"a": {"value": 0.51, "interval": [0.4, 0.6]}},
            "minima": [{"budget": 1e9 * 4**i, "params": 1e4 * 2**i, "refused": ""} for i in range(3)],
        },
        "parametric": {"rows": 9, "undetermined": "too few sizes"},
    }
    paths += [make_run(tmp_path / "sweep", {"plan": {}}, fit_json=json.dumps(fit), runs_csv="loss\n1\n")]
    arms = "arm,seed,validation_loss\ndense,0,2.0\ndense,1,2.2\nmoe,0,1.5\nmoe,1,1.6\n"
    paths += [make_run(tmp_path / "compared", {"seeds": [0, 1]}, runs_csv=arms)]
    texts = [{"text": "t", "tokens": 9, "perplexity": 8.0, "pruned": 9.5}]
    result = {"density": 0.5, "pruned_parameters": 1200, "texts": texts}
    paths += [make_run(tmp_path / "pruned", {"prune": {}}, result_json=json.dumps(result))]
    table = "- masks differ by 3 points\n\n**Arms**\n\n| arm | loss |\n|---|---|\n| x | 1.25 |\n"
    paths += [make_run(tmp_path / "study", {"name": "x"}, table_md=table)]
    paths += [make_run(tmp_path / "begun", {"steps": 3})]
    output = tmp_path / "out" / "page.html"
    assert report.main([*paths, f"--output={output}"]) == 0 and str(output) in capsys.readouterr().out.replace("\n", "")
    page = read(output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["page.html"]  # one file
    assert "2 training runs" in page.text and "1 search" in page.text and "abcdef0123" in page.text
    differ = next(table for table in page.tables if table[0][0] == "setting" and len(table[0]) == 3)
    # Names are as long as it takes to tell runs apart.
    assert differ[0][1:] == ["a/lm", "b/lm"] and differ[1:] == [["lr", "0.1", "0.2"], ["seed", "–", "3"]]
    trained = next(table for table in page.tables if "validation loss" in table[0])
    assert trained[1][:4] == ["a/lm", "10 of 10", "320", "1.100"] and trained[2][3] == "1.350"
    compared = next(table for table in page.tables if table[0][0] == "arm" and "seeds" in table[0])
    # Student's t of one degree of freedom: 12.706 x 0.1 for two values 0.2 apart.
    assert compared[1] == ["dense", "2.1000 ± 1.2706", "2.0000 to 2.2000", "2"]
    fits = next(table for table in page.tables if "interval of a" in table[0])
    assert fits[1][3:5] == ["0.5100", "0.4 to 0.6"] and fits[2][5] == "too few sizes"
    assert "Down to 41.0% of the weights" in page.text and "masks differ by 3 points" in page.text
    assert ["x", "1.25"] in [row for table in page.tables for row in table]
    assert "begun has no table yet" in page.text and "9.500" in page.text


def test_two_searches_are_compared_by_their_tickets(tmp_path):
    paths = [search(tmp_path / "one"), search(tmp_path / "two", levels=3)]
    figure = runs.tickets_figure({name: runs.read_tickets(tmp_path / name) for name in ("one", "two")})
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts[1:]] == ["one: winning ticket", "two: winning ticket"]
    assert ax.get_ylim()[1] <= 101
    assert report.main([*paths, f"--output={tmp_path / 'page.html'}"]) == 0


WRONG = {
    "not there": ("nowhere", "no such directory"),
    "a directory that no run made": ("empty", "is no run, it has no run.json; the --workdir of"),
    "a run of another version": ("old", "made by another version"),
    "a damaged config": ("damaged", "damaged"),
    "the same twice": ("good", "given twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_run_is_one_line(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "good", {})
    make_run(tmp_path / "old", {})
    (tmp_path / "old" / "run.json").write_text("{}")
    make_run(tmp_path / "damaged", {})
    (tmp_path / "damaged" / "config.json").write_text('{"steps": ')
    name, message = WRONG[case]
    assert report.main(["good", name]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "runs").exists()
