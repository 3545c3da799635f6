"""docs/results/evidence.toml has every page, and a page's tables are compared with a run's number by number.

That its commands parse is tested with those of all documents (`tests/test_documents.py`): the table of pages has them.
"""

import re
from pathlib import Path

import pytest

from scripts import evidence
from tessera.reports.html import Section, Table, write_report

PAGES = sorted(path.stem for path in evidence.RESULTS.glob("*.md") if path.stem != "README")
ROWS = [["4.4%", "ticket", "96.29 ± 0.14", "0.514 (0.476 to 0.553)", 3, "**74.3**", "–"]]
COLUMNS = ["weights", "arm", "accuracy (%)", "exponent", "seeds", "untrained (%)", "overlap"]


def page_of(rows, columns=COLUMNS):
    return evidence.read_tables("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|\n" + "".join(
        "| " + " | ".join(map(str, row)) + " |\n" for row in rows
    ))  # fmt: skip


def test_every_page_has_its_entry_and_every_entry_its_page():
    assert sorted(evidence.pages()) == PAGES
    for entry in evidence.pages().values():
        assert set(entry) - {"needs", "compared"} == {"commands", "seconds", "seeds", "commit"}
        assert entry["commands"] and re.fullmatch(r"[0-9a-f]{7}", entry["commit"])


@pytest.mark.parametrize("name", PAGES)
def test_every_command_stands_in_its_page(name):
    plain = lambda text: " ".join(text.replace("\\\n", " ").replace("`", " ").split())  # noqa: E731
    page = plain((evidence.RESULTS / f"{name}.md").read_text(encoding="utf-8"))
    for command in evidence.pages()[name]["commands"]:
        assert plain(command) in page


def test_the_table_of_pages_is_up_to_date():
    text = (evidence.RESULTS / "README.md").read_text(encoding="utf-8")
    assert evidence.write_index(text) == text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, 0),
        ({2: "96.42 ± 0.90"}, 0),  # inside the page's interval
        ({2: "96.44 ± 0.90"}, 1),
        ({3: "0.48"}, 0),
        ({3: "0.554 (0.5 to 0.6)"}, 1),
        ({4: 4}, 1),
        ({5: "74.3"}, 0),
        ({5: "74.31"}, 0),  # 74.3 with a digit more
        ({5: "74.4"}, 1),
        ({5: "–"}, 1),
        ({1: "random"}, 1),
        ({6: "7.5"}, 0),  # the page leaves it out
    ],
)
def test_a_changed_number_is_flagged_and_an_equal_one_is_not(changed, said):
    run = [[changed.get(i, str(cell).replace("*", "")) for i, cell in enumerate(ROWS[0])]]
    found = evidence.compare(page_of(ROWS), page_of(run))
    assert (len(found.outside), found.numbers, found.compared) == (said, 5, 5)


def test_tables_of_a_report_are_read_as_they_are_shown_and_matched_by_their_headings(tmp_path):
    other = Table(["arm", "loss"], [["a", 1.5]])
    numbers = Table(["arm", "Accuracy, %", "seeds"], [["ticket", "96.30 ± 0.02", 3]])
    write_report(tmp_path, "Title", [Section("Other", other), Section("Numbers", numbers)])
    run = evidence.read_tables((tmp_path / "tables.md").read_text(encoding="utf-8"))
    assert [table.columns for table in run] == [other.columns, numbers.columns]
    found = evidence.compare(page_of(ROWS), run)
    assert (found.outside, found.compared) == ([], 2)
    assert evidence.compare(page_of(ROWS * 2), run).compared == 0  # another number of rows is another table


def test_a_page_runs_in_an_empty_directory_and_its_status_says_what_is_outside(tmp_path, monkeypatch, capsys):
    script = tmp_path / "made.py"
    script.write_text(
        "from pathlib import Path\nPath('tables.md').write_text('| a | b |\\n|---|---|\\n| x | 2.5 |\\n')\n"
    )
    (tmp_path / "page.md").write_text("| a | b |\n|---|---|\n| x | 2.5 |\n")
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    entry = {"commands": [f"python {script}"], "seconds": 1, "seeds": "none", "commit": "0000000"}
    old = tmp_path / "runs" / "page" / "left_over.txt"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    assert evidence.run_page("page", entry, tmp_path / "runs") == 0 and not old.exists()
    (tmp_path / "page.md").write_text("| a | b |\n|---|---|\n| x | 2.4 |\n")
    assert evidence.run_page("page", entry, tmp_path / "runs") == 1
    assert "x | 2.4 | b: 2.5 is outside the page's 2.4" in capsys.readouterr().out
    assert evidence.run_page("page", entry | {"commands": ["python -c 'exit(3)'"]}, tmp_path / "runs") == 1


def test_a_command_runs_with_this_python_and_the_data_where_they_are(monkeypatch):
    monkeypatch.setenv("TESSERA_DATA", "/data")
    words = evidence.words_of("python scripts/study.py --config=configs/study_strong.py --config.data.dir=DATA")
    assert Path(words[1]) == evidence.ROOT / "scripts" / "study.py" and words[-1] == "--config.data.dir=/data"
    monkeypatch.delenv("TESSERA_DATA")
    assert len(evidence.words_of("python scripts/study.py --config.data.dir=DATA")) == 2
