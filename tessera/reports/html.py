"""One self-contained HTML page: sections of text, tables and matplotlib figures, with nothing fetched from outside.

Figures are inlined as SVG whose ink, grid and palette are CSS variables, so a page reads well in light and in dark.
"""

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from tessera.reports.style import GRID, INK, MUTED, PALETTE, RAMP

DARK = {
    **{INK: "#e3e8ed", MUTED: "#9aa7b3", GRID: "#38424c"},
    **dict(zip(PALETTE, ("#5cb3ea", "#f28b4b", "#3cc79e", "#dd8fc6", "#e0b34a", "#8cc9ee", "#b5b0bc"), strict=True)),
    **dict(zip(RAMP, ("#a08be0", "#7ea4dd", "#55bccb", "#4fd0a6", "#9be07c", "#e9dc55"), strict=True)),
}

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f8fa; --accent: #0072b2; --mark: #dcefe8; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14191e; --card: #1c2329; --accent: #5cb3ea; --mark: #1d3f35; DARK } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--grid) }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
p { max-width: 46rem; margin: .6rem 0 }
a { color: var(--accent) }
.lead { font-size: 1.06rem; background: var(--card); border-left: 4px solid var(--accent); border-radius: 4px;
  padding: .7rem 1.2rem; margin: 1.3rem 0 }
.lead h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
p { max-width: none }
.subtitle, .caption { color: var(--muted) }
.caption { font-size: .9rem }
nav { font-size: .9rem; margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem }
figure { margin: 1.1rem 0; overflow-x: auto }
figure svg { display: block; width: 100%; height: auto }
@media (max-width: 45rem) { figure svg { width: 44rem; max-width: none !important } }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .28rem .8rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap }
th { color: var(--muted); font-weight: 600; border-bottom: 2px solid var(--grid); vertical-align: bottom }
th.text, td.text { text-align: left }
td.wrap { white-space: normal; overflow-wrap: anywhere }
td.mark { background: var(--mark); font-weight: 600 }
details { margin: .8rem 0; background: var(--card); border-radius: 4px; padding: .5rem 1rem }
summary { cursor: pointer; font-weight: 600 }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .9em }
@media print { nav { display: none } figure, table { break-inside: avoid } }
"""

FULL = 9.6

Cell = str | int | float | None


class Table(NamedTuple):
    """A table; `marked` holds (row, column) to highlight.

    Columns without numbers are set left, the rest right. Floats have four significant digits, None is a dash.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Attributes:
      title: heading; "" for the opening statement, which is set apart at the top.
      content: trusted HTML (see `paragraphs` for plain text), a Figure, a Table, or several of these in order.
      caption: plain text under the content: how to read it.
      fold: the content starts collapsed, under a line that says this.
    """

    title: str
    content: str | Figure | Table | Sequence[str | Figure | Table]
    caption: str = ""
    fold: str = ""

    def parts(self) -> list[str | Figure | Table]:
        """The content as a list."""
        single = isinstance(self.content, str | Figure | Table)
        return [self.content] if single else list(self.content)  # type: ignore[list-item, arg-type]

    @property
    def slug(self) -> str:
        """The title as it appears in addresses and file names."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "summary"


def paragraphs(*texts: str) -> str:
    """Plain text as HTML paragraphs, special characters escaped."""
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def write_number(value: Cell) -> str:
    """A table cell as text: floats with four significant digits, None and NaN as a dash, the rest as it is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    # "g" alone would drop trailing zeros and leave a column ragged; exponents only where digits would be lost.
    return f"{value:#.4g}".rstrip(".") if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"


def table_html(table: Table) -> str:
    """The table as HTML, escaped, in a frame that scrolls sideways on a narrow screen."""
    numeric = re.compile(r"^[<>~]?[-+−]?[\d.]")
    text_columns = {
        column
        for column in range(len(table.columns))
        # A sentence may begin with a number.
        if not any(
            numeric.match(text) and len(text) <= 40 for text in (write_number(row[column]) for row in table.rows)
        )
    }

    def cell(tag: str, value: Cell, column: int, marked: bool = False) -> str:
        text = write_number(value)
        names = ["text"] * (column in text_columns) + ["wrap"] * (len(text) > 60) + ["mark"] * marked
        attribute = f' class="{" ".join(names)}"' if names else ""
        return f"<{tag}{attribute}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", name, column) for column, name in enumerate(table.columns))
    body = "".join(
        "<tr>" + "".join(cell("td", value, j, (i, j) in table.marked) for j, value in enumerate(row)) + "</tr>\n"
        for i, row in enumerate(table.rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def css_name(colour: str) -> str:
    """The CSS variable that stands for one of the figures' colours."""
    named = {INK: "--ink", MUTED: "--muted", GRID: "--grid"}
    return named.get(colour, f"--c{colour[1:]}")


def figure_svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as inline SVG; `prefix` keeps its ids apart from those of other figures, `label` is read aloud.

    Deterministic: the same figure gives the same text.
    """
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
    for colour in DARK:
        svg = svg.replace(colour, f"var({css_name(colour)})")
    # One size of lettering on the page: a narrow figure stays narrow. FULL inches fill the page's width.
    share = f"max-width: {100 * min(1.0, figure.get_figwidth() / FULL):.0f}%"
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" style="{share}" ', 1)


def section_html(section: Section) -> str:
    """One section as HTML."""
    pieces = []
    for index, part in enumerate(section.parts()):
        if isinstance(part, Figure):
            prefix = f"{section.slug}-{index}"
            pieces.append(f"<figure>{figure_svg(part, prefix, section.title)}</figure>")
        else:
            pieces.append(table_html(part) if isinstance(part, Table) else part)
    body = "\n".join(pieces)
    if section.caption:
        body += f'\n<p class="caption">{html.escape(section.caption)}</p>'
    if section.fold:
        body = f"<details><summary>{html.escape(section.fold)}</summary>\n{body}\n</details>"
    if not section.title:
        return f'<div class="lead">{body}</div>'
    return f'<section id="{section.slug}"><h2>{html.escape(section.title)}</h2>\n{body}</section>'


def page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """A complete HTML document of the sections in order, with links to them on top when there are several.

    Raises:
      ValueError: two sections have titles that would give one address.
    """
    slugs = [section.slug for section in sections]
    for section in sections:
        if slugs.count(section.slug) > 1:
            raise ValueError(f"two sections have the address #{section.slug} (title {section.title!r}); rename one")
    light = "; ".join(f"{css_name(colour)}: {colour}" for colour in DARK)
    dark = "; ".join(f"{css_name(colour)}: {value}" for colour, value in DARK.items())
    named = [section for section in sections if section.title]
    links = "".join(f'<a href="#{section.slug}">{html.escape(section.title)}</a>' for section in named)
    opening = [section_html(section) for section in sections if not section.title]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{CSS.replace('LIGHT', light).replace('DARK', dark)}</style></head>",
            f"<body><main><h1>{html.escape(title)}</h1>",
            f'<p class="subtitle">{html.escape(subtitle)}</p>' if subtitle else "",
            *opening,
            f"<nav>{links}</nav>" if len(named) > 2 else "",
            *[section_html(section) for section in named],
            "</main></body></html>\n",
        ]
    )
