"""Score a config on a fixed budget: `python scripts/race/run.py 2e12 --config=race_text:2e12`, or write the records.

A track takes the configs of one command and trains them with it. A row has all that a score depends on: commit, the
whole config, seeds, versions, and the hash of the text that was read. `--records` writes the table of
docs/leaderboard.md from docs/leaderboard.jsonl.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessera.cli.main import COMMANDS, Flag, Invocation, run

ROOT = Path(__file__).parents[2]
ROWS, PAGE = ROOT / "docs" / "leaderboard.jsonl", ROOT / "docs" / "leaderboard.md"
MARKS = ("<!-- records -->", "<!-- end of records -->")


@dataclass(frozen=True)
class Track:
    """What is scored under which budget.

    Attributes:
      command: that trains, whose configs race; its module under scripts/race has `main`.
      module: see `command`.
      config: the config of the record, which races without `--config`.
      budget: training FLOPs (6 N D), or live weights.
      unit: of the budget.
      score: what is compared, with its unit.
      better: -1 where less is, 1 where more is.
    """

    command: str
    module: str
    config: str
    budget: float
    unit: str
    score: str
    better: int


TEXT: dict[str, Any] = {
    "command": "train",
    "module": "scripts.race.text",
    "unit": "training FLOP (6ND)",
    "score": "bits per byte of the test text",
    "better": -1,
}
TRACKS = {
    "2e12": Track(config="race_text:2e12", budget=2e12, **TEXT),
    "2e13": Track(config="race_text:2e13", budget=2e13, **TEXT),
    "digits": Track(
        command="find-ticket",
        module="scripts.race.digits",
        config="race_digits",
        budget=2000,
        unit="live weights",
        score="test accuracy, %",
        better=1,
    ),
}
FLAGS = (
    Flag("track", "2e12", f"What is scored: {', '.join(TRACKS)}."),
    Flag("seeds", "0,1,2,3,4", "Seeds, each a run of its own; a record has five."),
    Flag("out", "runs/race/rows.jsonl", "File to which the row is added."),
)


class OverBudget(ValueError):
    """A config that costs more than its track allows."""


def check_budget(track: str, cost: float, what: str) -> None:
    """Refuse a cost above the track's budget.

    Raises:
      OverBudget: with the cost, the budget and what the cost is made of.
    """
    found = TRACKS[track]
    if not 0 < cost <= found.budget:
        raise OverBudget(f"{what}: {cost:.6g} {found.unit}; the track {track} allows {found.budget:g}")


def race(
    invocation: Invocation, cost: float, content_hash: str, score: Callable[[Sequence[int], Path], Sequence[float]]
) -> int:
    """Score the seeds, add the row to `--out`, print it. Returns the exit status."""
    from rich.console import Console

    from lottery.summary import interval
    from tessera.infra.workdir import differing, resolve, revision, versions

    track = invocation.flags["track"]
    seeds = tuple(int(seed) for seed in invocation.flags["seeds"].split(","))
    settings = resolve(invocation.config)
    root = Path(invocation.workdir or f"runs/race/{track}-{invocation.name}")
    scores = [float(one) for one in score(seeds, root)]
    mean, half, _ = interval(scores)
    row = {
        "track": track,
        "config": invocation.name,
        "score": mean,
        "half_width": half if len(scores) > 1 else None,
        "scores": scores,
        "seeds": seeds,
        "cost": cost,
        "content_hash": content_hash,
        **revision(),
        "versions": versions(),
        "differs": differing(settings, resolve(invocation.defaults)),
        "settings": settings,
    }
    out = Path(invocation.flags["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    found = TRACKS[track]
    Console().print(
        f"{invocation.name}: {found.score}: {shown(row)} ({', '.join(f'{one:.4f}' for one in scores)})\n"
        f"{cost:.4g} of {found.budget:g} {found.unit}; row: {out}",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def shown(row: Mapping[str, Any]) -> str:
    """Mean and half-width of the 95% Student-t interval over seeds."""
    digits = 4 if TRACKS[row["track"]].better < 0 else 2
    half = "" if row["half_width"] is None else f" ± {row['half_width']:.{digits}f}"
    return f"{row['score']:.{digits}f}{half}"


def records(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables of the page: a track each, only rows of one content hash ranked together, the best first."""
    lines = []
    for name, track in TRACKS.items():
        mine = [row for row in rows if row["track"] == name]
        lines += ["", f"### {name}: {track.score}, at most {track.budget:g} {track.unit}"]
        if not mine:
            lines += ["", "Not measured."]
        for content_hash in dict.fromkeys(row["content_hash"] for row in mine):
            ranked = [row for row in mine if row["content_hash"] == content_hash]
            ranked.sort(key=lambda row: -track.better * row["score"])
            lines += ["", f"Data `{content_hash[:12]}`:", ""]
            lines += [
                f"| rank | config | {track.score} | {track.unit} | seeds | Python, JAX | commit |",
                "|---" * 7 + "|",
            ]
            for rank, row in enumerate(ranked, 1):
                seeds, made = ", ".join(map(str, row["seeds"])), row["versions"]
                commit = row["revision"][:7] + ("+" if row["changed"] else "")
                python = f"{made['python']}, {made['jax']}"
                cells = (rank, f"`{row['config']}`", shown(row), f"{row['cost']:.4g}", seeds, python, commit)
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines).strip()


def write_records() -> None:
    """Write the records into their page."""
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(MARKS[0])
    tail = rest.partition(MARKS[1])[2]
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    PAGE.write_text(f"{head}{MARKS[0]}\n{records(rows)}\n{MARKS[1]}{tail}", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """Run the command of the track that `--track` names."""
    if "--records" in argv:
        return write_records()
    name = next((word.partition("=")[2] for word in argv if word.startswith("--track=")), "2e12")
    if name not in TRACKS:
        print(f"error: --track={name}: there is no such track; choose one of {', '.join(TRACKS)}", file=sys.stderr)
        raise SystemExit(2)
    track = TRACKS[name]
    base = COMMANDS[track.command]
    run(replace(base, module=track.module, script=base.script, config=track.config, flags=(*base.flags, *FLAGS)), argv)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # as a program, its own package is not importable
    # The tracks' modules import this file by its name, too: one copy of its classes.
    from scripts.race.run import main

    main(sys.argv[1:])
