"""Pages in a browser: the tour's, a report of each kind, on a phone and on a desk, in light and in dark.

Chromium (Debian's `chromium`, or Google's) looks at each page in a frame of the width, so that its media queries are
the phone's: no error on the console, every picture drawn, nothing wider than the screen but what scrolls by itself.
"""

import json
import shutil
import subprocess

import pytest

from tests.test_documents import SHORT, make_tour, script
from tests.test_documents import run as run_command

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
    "--hide-scrollbars",
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium here")]

FRAME = """<!doctype html><html style="color-scheme: SCHEME"><body style="margin: 0">
<iframe id="frame" style="width: WIDTHpx; height: 900px; border: 0" src="PAGE"></iframe>
<script>onload = () => {
  const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow
  const size = node => node.getBoundingClientRect()
  const drawn = node => size(node).width > 20 && size(node).height > 20 && (node.naturalWidth ?? 1) > 0
  const pictures = [...page.querySelectorAll('figure svg, figure img, main > img')]
  page.querySelectorAll('details').forEach(node => node.open = true)
  document.title = JSON.stringify({
    pictures: pictures.length, missing: pictures.filter(node => !drawn(node)).length,
    page: root.scrollWidth, screen: root.clientWidth, background: view.getComputedStyle(page.body).backgroundColor,
  })
}</script></body></html>"""


def look(page, width, scheme, directory):
    """What the browser says of a page, and the lines on its console."""
    frame = FRAME.replace("SCHEME", scheme).replace("WIDTH", str(width)).replace("PAGE", page.resolve().as_uri())
    file = directory / f"frame-{width}-{scheme}.html"
    file.write_text(frame, encoding="utf-8")
    where = ("--allow-file-access-from-files", f"--user-data-dir={directory / 'profile'}", "--enable-logging=stderr")
    words = [BROWSER, *QUIET, *where, "--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    assert title, done.stderr[-2000:]
    return json.loads(title.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")), [
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    ]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind by name, below one directory."""
    made = tmp_path_factory.mktemp("pages")
    tour = made / "tour"
    make_tour(tour)
    found = {"tour": tour / "report.html"}
    found |= {name: tour / name / "report.html" for name in ("ticket", "experts", "plan/split", "tokens", "sweep")}
    (made / "runs").mkdir()
    shutil.copytree(tour / "experts" / "dense-0", made / "runs" / "lm")
    shutil.copytree(tour / "ticket", made / "runs" / "ticket")
    (made / "text.py").write_text("x = 1\n" * 300)
    for name, page in (
        ("explain", "explain"),
        ("prune", "pruned"),
        ("study", "study"),
        ("analyze_ticket", "ticket/analysis"),
    ):
        run_command(made, script(name), *SHORT[name])
        (found[name],) = (made / "runs" / page).glob("*.html")
    runs = ("plan/one", "plan/split", "ticket", "experts", "sweep")
    words = [
        "report",
        *(str(tour / name) for name in runs),
        str(made / "runs" / "pruned"),
        str(made / "runs" / "study"),
    ]
    console = "from tessera.cli.main import main; main()"
    run_command(made, "-c", console, *words, "--tokens=200", "--output=runs.html")
    return found | {"runs": made / "runs.html"}


def test_the_browser_sees_what_is_wrong(tmp_path):
    """An error, a picture without size, a line that is too long."""
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><body><main><figure><svg width="0" height="9"><path d="M 0 none"/></svg></figure>'
        f'<p style="white-space: nowrap">{"wide " * 200}</p></main>'
    )
    found, console = look(page, 390, "dark", tmp_path)
    assert found["missing"] == found["pictures"] == 1 and found["page"] > found["screen"] == 390
    assert "Expected number" in " ".join(console)


def test_pages_on_phone_and_desk_in_light_and_dark(pages, tmp_path):
    wrong = []
    for name, page in pages.items():
        pictures = page.read_text(encoding="utf-8").count("<figure")
        seen = set()
        for width in (390, 1280):
            for scheme in ("light", "dark"):
                found, console = look(page, width, scheme, tmp_path)
                seen.add(found["background"])
                problems = console + ["pictures"] * (found["missing"] > 0 or found["pictures"] != pictures)
                problems += ["scrolls sideways"] * (found["page"] > found["screen"])
                wrong += [f"{name}, {width} pixels, {scheme}: {problem}" for problem in problems]
        wrong += [f"{name}: one background for light and dark"] * (len(seen) != 2)
    assert not wrong, "\n".join(wrong)
    assert pages["tour"].read_text(encoding="utf-8").count("<figure") >= 4  # and a text, the fifth picture
