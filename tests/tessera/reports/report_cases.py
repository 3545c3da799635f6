"""Rows of made-up searches, and pages parsed as a browser would; shared by the tests of reports."""

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Text, ids and addresses of a page; fails on tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.words, self.tables = [], [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        found = dict(attributes)
        assert tag not in ("script", "link", "iframe", "object"), f"<{tag}> in a self-contained page"
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("src", "href", "xlink:href") if name in found]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def read(path):
    """Parse a page and check that nothing in it points outside."""
    text = path.read_text(encoding="utf-8")
    found = Page(text)
    assert len(found.ids) == len(set(found.ids)), "an id occurs twice"
    for link in found.links:
        assert link.startswith(("data:", "#")), f"{link[:60]} is outside the page"
        assert not link.startswith("#") or link[1:] in found.ids, f"{link} leads nowhere"
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#") and target[1:] in found.ids, f"url({target}) leads nowhere"
    assert "@import" not in text
    return found


ARMS = ("ticket", "reinit", "random_mask")
RATE = 0.8


def make_rows(seeds=3, levels=4, arms=ARMS, accuracy=None):
    """Rows of a made-up search; `accuracy(arm, level, seed)` defaults to a ticket that holds and controls that fall."""
    fall = {"dense": 0.0, "ticket": 0.0, "reinit": -0.02, "random_mask": -0.04}
    accuracy = accuracy or (lambda arm, level, seed: 0.95 + 0.003 * seed + fall.get(arm, -0.01) * level)
    rows = []
    for level in range(levels + 1):
        for arm in ("dense",) if level == 0 else arms:
            for seed in range(seeds):
                value = accuracy(arm, level, seed)
                steps = [10, 20, 30]
                rows.append(
                    {
                        "level": level,
                        "arm": arm,
                        "seed": seed,
                        "density": RATE**level,
                        "alive": round(1000 * RATE**level),
                        "prunable": 1000,
                        "layers": {"dense0/kernel": RATE**level, "output/kernel": 0.9**level},
                        "start_step": 0,
                        "early_stop_step": 20 + 10 * (arm != "ticket" and level > 0),
                        "early_stop_test_accuracy": value,
                        "final_test_accuracy": value - 0.01,
                        "best_validation_loss": 1 - value + 0.01,
                        "curve": {
                            "step": steps,
                            "train_loss": [1.0, 0.5, 0.2],
                            "validation_loss": [1.0, 0.5, 1.1 - value],
                            "validation_accuracy": [0.1, 0.6, value],
                        },
                    }
                )
    return rows
