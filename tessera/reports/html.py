"""One self-contained HTML page: sections of text, tables and matplotlib figures, with nothing fetched from outside.

Figures are inlined as SVG whose colors are CSS variables, so a page reads well in light and in dark; each is written
as a PNG file beside the page too. A figure may be given as a function that draws it: then nothing is drawn before the
page is written, and results can be saved first.
"""

import html
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from tessera.infra.logger import Rows, write_text
from tessera.infra.workdir import flatten
from tessera.reports.style import CARD, DARK, GRID, INK, MARK, MUTED, PALETTE, PAPER, Figure, MissingMatplotlib, short

NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", CARD: "card", MARK: "mark", PALETTE[0]: "accent"}

CSS = """
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--grid) }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
p { margin: .6rem 0 }
a { color: var(--accent) }
.lead { font-size: 1.06rem; background: var(--card); border-left: 4px solid var(--accent); border-radius: 4px;
  padding: .7rem 1.2rem; margin: 1.3rem 0 }
.subtitle, .caption { color: var(--muted) }
.caption { font-size: .9rem }
nav { font-size: .9rem; margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem }
figure { margin: 1.1rem 0; overflow-x: auto }
figure svg { display: block; width: 100%; height: auto; max-width: calc(100% * var(--share)) }
@media (max-width: 45rem) {
  figure svg { width: calc(44rem * var(--share)); max-width: none }
  figure.wide::before { content: "Scroll sideways: the lines' names are at the right."; position: sticky; left: 0;
    color: var(--muted); font-size: .85rem }
}
svg text { fill: var(--ink);
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .28rem .8rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap }
th { color: var(--muted); font-weight: 600; white-space: normal; border-bottom: 2px solid var(--grid);
  vertical-align: bottom }
th.text, td.text { text-align: left }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 11rem }
li { margin: .35rem 0 }
@media (max-width: 45rem) {
  .prose thead { display: none }
  .prose tr, .prose td { display: block; text-align: left; white-space: normal; padding: .1rem 0; border: 0 }
  .prose tr { border-bottom: 1px solid var(--grid); padding: .5rem 0 }
  .prose td::before { content: attr(data-column) ": "; color: var(--muted) }
}
td.mark { background: var(--mark); font-weight: 600 }
details { margin: .8rem 0; background: var(--card); border-radius: 4px; padding: .5rem 1rem }
summary { cursor: pointer; font-weight: 600 }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .9em }
@media print { nav { display: none } figure, table { break-inside: avoid } }
"""

LONG_TEXT = 60  # letters of a cell that is a sentence
WRAPPED = 28  # letters from which on a cell's words may stand under each other
FULL = 9.6  # inches that fill the width of a page

# What `run.json` has, as a page calls it.
RUN_NAMES = {
    "began": "began (UTC)",
    "changed": "code changed since that revision",
    "device_kind": "device",
    "format": "format of the files",
    "name": "name of the config",
    "processes": "processes of the run",
    "revision": "git revision of the code",
}
Cell = str | int | float | None


class Table(NamedTuple):
    """A table; `marked` holds (row, column) to highlight.

    Columns without numbers are set left, the rest right. Floats have four significant digits, None is a dash.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: frozenset[tuple[int, int]] = frozenset()

    @property
    def texts(self) -> list[list[str]]:
        """The cells as they are shown."""
        return [[write_number(cell) for cell in row] for row in self.rows]

    @property
    def text_columns(self) -> set[int]:
        """Numbers of the columns that hold no numbers."""
        number = re.compile(r"^[<>~]?[-+−]?[\d.]")
        # A sentence may begin with a number.
        found = {i for row in self.texts for i, text in enumerate(row) if number.match(text) and len(text) <= 40}
        return set(range(len(self.columns))) - found


Part = str | Figure | Table | Callable[[], Figure]


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Attributes:
      title: heading; "" for the opening statement, which is set apart at the top.
      content: trusted HTML (see `paragraphs` for plain text), a Figure or a function that draws one, a Table, or
        several of these in order.
      caption: plain text under the content: how to read it.
      fold: the content starts collapsed, under a line that says this.
    """

    title: str
    content: Part | list[Any]
    caption: str = ""
    fold: str = ""

    def parts(self) -> list[Any]:
        """The content as a list, every figure drawn."""
        parts = self.content if isinstance(self.content, list) else [self.content]
        return [part() if callable(part) else part for part in parts]

    @property
    def slug(self) -> str:
        """The title as it appears in addresses and file names."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "summary"


def paragraphs(*texts: str) -> str:
    """Plain text as HTML paragraphs, special characters escaped."""
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def bullets(*texts: str) -> str:
    """Plain text as an HTML list, special characters escaped."""
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>" if texts else ""


def write_number(value: Cell) -> str:
    """A table cell as text: floats with four significant digits, None and NaN as a dash, the rest as it is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    # "g" alone would drop trailing zeros and leave a column ragged; exponents only where digits would be lost.
    return f"{value:#.4g}".rstrip(".") if value == 0 or 1e-3 <= abs(value) < 1e6 else short(value)


def table_of(rows: Rows, columns: Mapping[str, str | Callable[[Mapping[str, Any]], Any]] | None = None) -> Table:
    """Rows (dicts) as a table, a dash where a row lacks a column.

    Args:
      rows: a line each.
      columns: heading -> key of a row, or a function of it; by default all keys in order of appearance.
    """
    columns = columns or {key.replace("_", " "): key for row in rows for key in row}
    getters = [value if callable(value) else lambda row, key=value: row.get(key) for value in columns.values()]
    return Table(list(columns), [[_cell(get(row)) for get in getters] for row in rows])


def _cell(value: Any) -> Cell:
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def terminal_table(table: Table, title: str = "", **options: Any) -> RichTable:
    """The table for a terminal, highlighted cells in bold; `options` as for `rich.table.Table`."""
    found, text_columns = RichTable(title=title, title_justify="left", **options), table.text_columns
    for i, name in enumerate(table.columns):
        found.add_column(escape(name), justify="left" if i in text_columns else "right", overflow="fold")
    for i, row in enumerate(table.texts):
        found.add_row(*(f"[bold]{escape(t)}[/]" if (i, j) in table.marked else escape(t) for j, t in enumerate(row)))
    return found


def table_html(table: Table) -> str:
    """The table as HTML, escaped, in a frame that scrolls sideways on a narrow screen; sentences are stacked there."""
    text_columns = table.text_columns
    prose = any(len(text) > LONG_TEXT for row in table.texts for text in row)

    def line(tag: str, texts: Sequence[str], i: int = -1) -> str:
        cells = []
        for j, text in enumerate(texts):
            names = (
                ["text"] * (j in text_columns)
                + ["wrap"] * (len(text) > WRAPPED and " " in text or len(text) > LONG_TEXT)
                + ["mark"] * ((i, j) in table.marked)
            )
            attribute = f' class="{" ".join(names)}"' if names else ""
            if prose and tag == "td":
                attribute += f' data-column="{html.escape(table.columns[j])}"'
            cells.append(f"<{tag}{attribute}>{html.escape(text)}</{tag}>")
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join(line("td", row, i) for i, row in enumerate(table.texts))
    head = f"<thead>{line('th', table.columns)}</thead>"
    begin = '<table class="prose">' if prose else "<table>"
    return f'<div class="scroll">{begin}{head}\n<tbody>{body}</tbody></table></div>'


def table_markdown(table: Table) -> str:
    """The table as Markdown."""
    line = lambda cells: f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"  # noqa: E731
    return line(table.columns) + "|" + "---|" * len(table.columns) + "\n" + "".join(map(line, table.texts))


def css_name(color: str) -> str:
    """The CSS variable that stands for one of the figures' colors."""
    return f"--{NAMES.get(color, 'c' + color[1:])}"


def figure_svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as inline SVG; `prefix` makes its ids differ from those of other figures, `label` is read aloud.

    Deterministic: the same figure gives the same text.
    """
    import matplotlib

    buffer = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "tessera"}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Only ids that something points at stay: matplotlib names every group, and not always uniquely.
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in wanted else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    svg = svg.replace("#000000", INK)  # what matplotlib draws by default
    for color in DARK:
        svg = svg.replace(color, f"var({css_name(color)})")
    # One font size on the page: a narrow figure stays narrow.
    share = f"--share: {share_of(figure):.2f}"
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" style="{share}" ', 1)


def joined(title: str, sections: Sequence[Section]) -> Section:
    """Several sections as one, each under a smaller heading with its caption: one entry in the page's menu."""
    parts: list[Any] = []
    for section in sections:
        caption = f'<p class="caption">{html.escape(section.caption)}</p>' if section.caption else ""
        content = section.content if isinstance(section.content, list) else [section.content]
        parts += [f"<h3>{html.escape(section.title)}</h3>", *content, *([caption] if caption else [])]
    return Section(title, parts)


def share_of(figure: Figure) -> float:
    """The part of a page's width that a figure takes."""
    return float(min(1.0, figure.get_figwidth() / FULL))


def section_html(section: Section) -> str:
    """One section as HTML."""
    parts = []
    for index, part in enumerate(section.parts()):
        if isinstance(part, Table):
            part = table_html(part)
        elif not isinstance(part, str):
            wide = ' class="wide"' * (share_of(part) > 0.5)  # too wide for a phone
            part = f"<figure{wide}>{figure_svg(part, f'{section.slug}-{index}', section.title)}</figure>"
        parts.append(part)
    parts += [f'<p class="caption">{html.escape(section.caption)}</p>'] * bool(section.caption)
    body = "\n".join(parts)
    if section.fold:
        body = f"<details><summary>{html.escape(section.fold)}</summary>\n{body}\n</details>"
    if not section.title:
        return f'<div class="lead">{body}</div>'
    return f'<section id="{section.slug}"><h2>{html.escape(section.title)}</h2>\n{body}</section>'


def page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """A complete HTML document of the sections in order, with links to them on top when there are several.

    Raises:
      ValueError: two sections have titles that would give one address.
      MissingMatplotlib: there are figures to draw, and matplotlib is not installed.
    """
    slugs = [section.slug for section in sections]
    for section in sections:
        if slugs.count(section.slug) > 1:
            raise ValueError(f"two sections have the address #{section.slug} (title {section.title!r}); rename one")
    light = "; ".join(f"{css_name(color)}: {color}" for color in DARK)
    dark = "; ".join(f"{css_name(color)}: {value}" for color, value in DARK.items())
    named = [section for section in sections if section.title]
    links = "".join(f'<a href="#{section.slug}">{html.escape(section.title)}</a>' for section in named)
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{CSS.replace('LIGHT', light).replace('DARK', dark)}</style></head>",
        f"<body><main><h1>{html.escape(title)}</h1>",
        f'<p class="subtitle">{html.escape(subtitle)}</p>' if subtitle else "",
        *[section_html(section) for section in sections if not section.title],
        f"<nav>{links}</nav>" if len(named) > 2 else "",
        *[section_html(section) for section in named],
        "</main></body></html>\n",
    ]
    return "\n".join(lines)


def write_report(
    workdir: Path | str, title: str, sections: Sequence[Section], *, subtitle: str | None = None, name: str = "report"
) -> Path:
    """Write `<name>.html`, its tables as `tables.md`, and `figures/*.png` in `workdir`, each file in one step.

    Returns the page's path.

    The subtitle is the name of `workdir` where none is given.

    Raises:
      ValueError, MissingMatplotlib: see `page`.
    """
    workdir = Path(workdir)
    sections = [replace(section, content=section.parts()) for section in sections]
    for section in sections:
        figures = [part for part in section.parts() if not isinstance(part, str | Table)]
        for index, figure in enumerate(figures):
            stem = section.slug + (f"-{index + 1}" if len(figures) > 1 else "")
            _write_png(workdir / "figures" / f"{stem}.png", figure)
    path = workdir / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = [(one.title, table_markdown(part)) for one in sections for part in one.parts() if isinstance(part, Table)]
    beside = "tables.md" if name == "report" else f"{name}_tables.md"
    write_text(workdir / beside, "\n".join(f"**{title}**\n\n{text}" for title, text in tables))
    write_text(path, page(title, sections, subtitle=workdir.resolve().name if subtitle is None else subtitle))
    return path


def _write_png(path: Path, figure: Figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=160, facecolor=PAPER, metadata={"Software": None})
    os.replace(temporary, path)
    figure.set_layout_engine("none")  # the places of the axes hold: computing them again is half of drawing again


def print_report(write: Callable[..., Path], *arguments: Any) -> None:
    """Write a page and print its path; without matplotlib, the one line that names the extra to install."""
    try:
        line = f"report: {write(*arguments)}"
    except MissingMatplotlib as error:
        line = str(error)
    Console().print(line, soft_wrap=True, markup=False)


def read_json(path: Path) -> dict[str, Any]:
    """What a run wrote about itself; empty if the file is absent."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def config_section(workdir: Path | str, title: str = "Settings") -> Section:
    """Every setting of the run with its dotted name, the versions it ran on and the command, folded away."""
    workdir = Path(workdir)
    files = {"config.json": ("setting", "value"), "run.json": ("run", ""), "versions.json": ("package", "version")}
    tables = []
    for name, columns in files.items():
        found = sorted(flatten(read_json(workdir / name)).items())
        if name == "run.json" and found:
            found = [(RUN_NAMES.get(key, key), value) for key, value in found if value is not None and value != {}]
            found += [("this page was written (UTC)", time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()))]
        plain = [(key, value if isinstance(value, str) and value else json.dumps(value)) for key, value in found]
        tables += [Table(columns, plain)] * bool(plain)
    if not tables:
        return Section(title, paragraphs(f"No config.json in {workdir.name}."))
    return Section(title, tables, fold="Every setting, the command, the machine and the versions")
