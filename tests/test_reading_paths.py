"""The README's sizes, reading paths and links are true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
PATHS = dict(re.findall(r"^- \*\*(.+?)\*\*: .*?\n  (`.*`)$", TEXT, re.MULTILINE))


def lines(path):
    return len((ROOT / path).read_text().splitlines())


@pytest.mark.parametrize("reader", ["Ticket researcher", "MoE engineer", "Scaling-law analyst"])
def test_a_reading_path_has_at_most_1500_lines(reader):
    files = re.findall(r"`([\w/]+\.py)`", PATHS[reader])
    assert len(files) >= 4
    assert sum(map(lines, files)) <= 1500, {file: lines(file) for file in files}


def test_the_size_is_stated_as_it_is():
    (stated,) = re.findall(r"([\d,]+) lines of Python in five packages", TEXT)
    packages = ("lottery", "moe", "sharding", "scaling", "tessera")
    count = sum(lines(path.relative_to(ROOT)) for name in packages for path in (ROOT / name).rglob("*.py"))
    assert int(stated.replace(",", "")) == pytest.approx(count, rel=0.05)


def test_links_to_files_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links and not [link for link in links if not (ROOT / link).exists()]
