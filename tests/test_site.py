"""The documentation site: pages are reached, tutorials run, it needs no network and has no broken link."""

import html.parser
import os
import re
import subprocess
import sys
import urllib.parse
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted(path for path in (ROOT / "docs" / "tutorials").glob("*.md") if path.name != "index.md")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Its commands need a model on disk: `test_documents.py` runs it.
OF_COMMANDS = "prune_and_serve"


def code(path):
    return "\n".join(BLOCK.findall(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_ends_with_an_assertion_on_its_result(path):
    last = BLOCK.findall(path.read_text(encoding="utf-8"))[-1].rstrip().splitlines()[-1]
    assert last.strip().startswith("assert ")


@pytest.mark.docs
@pytest.mark.parametrize("path", [path for path in TUTORIALS if path.stem != OF_COMMANDS], ids=lambda path: path.stem)
def test_a_tutorial_runs(path):
    """Its blocks in order, as one program on the eight devices that tests have."""
    with jax.numpy_rank_promotion("allow"):
        exec(compile(code(path), path.name, "exec"), {"__name__": path.stem})


def test_every_page_is_in_the_navigation():
    """What the results' hook does not add by itself; a strict build says the same, but needs mkdocs."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if page not in nav and not page.startswith("results/")]


def test_every_source_of_a_made_page_is_there():
    """Headings that docs/hooks.py looks for."""
    hooks = (ROOT / "docs" / "hooks.py").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    guides = re.findall(r"^## How to add a (\w+)$", contributing, re.MULTILINE)
    assert guides and all(f'"{name}":' in hooks for name in guides)
    assert "\n## Install\n" in (ROOT / "README.md").read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """What a built page links to, loads, and offers as anchors."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        for name in ("src", "href"):
            if tag in ("img", "script", "link", "iframe") and found.get(name) and found.get("rel") != "canonical":
                self.loads.append(found[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly."""
    if not find_spec("mkdocs"):
        pytest.skip("needs the extra docs: make docs")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {path: Page(path.read_text(encoding="utf-8")) for path in out.rglob("*.html")}


@pytest.mark.docs
def test_no_link_inside_the_site_is_broken(site):
    broken = []
    for path, page in site.items():
        for link in [*page.links, *page.loads]:
            target, _, anchor = urllib.parse.unquote(link).partition("#")
            if "://" in link or link.startswith(("mailto:", "data:", "javascript:")) or path.name == "404.html":
                continue
            file = (path.parent / target).resolve() if target else path
            if not file.exists():
                broken.append(f"{path.name}: no {link}")
            elif anchor and file in site and anchor not in site[file].anchors and not anchor.startswith("__"):
                broken.append(f"{path.name}: no {link}")
    assert len(site) > 80 and not broken, "\n".join(sorted(set(broken)))


@pytest.mark.docs
def test_nothing_is_fetched_from_elsewhere(site):
    """Scripts, styles, fonts and pictures are files of the site."""
    away = {load for page in site.values() for load in page.loads if load.startswith(("http", "//"))}
    assert not away
    (root,) = {path.parent for path in site if path.name == "404.html"}
    for style in root.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8"))


@pytest.mark.docs
@pytest.mark.parametrize("package", ["lottery", "moe", "sharding", "scaling"])
def test_every_public_name_is_in_the_reference(site, package):
    """An anchor for everything in a package's `__all__`, and in that of its modules."""
    import importlib

    anchors = set().union(*(page.anchors for path, page in site.items() if path.parent.name == "api"))
    module = importlib.import_module(package)
    missing = []
    for name in module.__all__:
        value = getattr(module, name)
        names = getattr(value, "__all__", None) if hasattr(value, "__path__") or hasattr(value, "__file__") else [None]
        for inner in names or ():
            wanted = getattr(value, inner) if inner else value
            if callable(wanted) and hasattr(wanted, "__module__"):
                if (
                    f"{wanted.__module__}.{wanted.__name__}" not in anchors
                    and f"{package}.{name}.{inner}" not in anchors
                ):
                    missing.append(f"{package}.{name}{f'.{inner}' if inner else ''}")
    assert not missing
