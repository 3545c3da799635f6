import io

import toy_sweep
from rich.console import Console

from scaling.sweeps.sweep import Status
from tessera.sweeps.table import SweepTable


def status(**changes):
    found = Status(toy_sweep.runs())
    for name, values in changes.items():
        setattr(found, name, values)
    return found


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with SweepTable(every=1e9, stream=stream) as show:
        show(status())
        show(status())  # nothing ended: no second line
        half = status(states=["done", "running", "waiting", "failed"])
        half.steps = [run.steps for run in half.runs]
        half.steps[1] //= 2
        show(half)
    first, second = stream.getvalue().splitlines()
    assert first.startswith("runs 0/4  0.0% of FLOPs")
    assert second.startswith("runs 1/4") and "1 failed" in second and f"running: {half.runs[1].name} 50%" in second


def test_the_time_left_follows_from_the_flops_done():
    show, begun = SweepTable(stream=io.StringIO()), status()
    assert show.left(begun, 100.0) == ""
    later = status()
    later.steps = [run.steps // 4 for run in later.runs]
    assert show.share(later) == sum(s * r.flops_per_step for s, r in zip(later.steps, later.runs, strict=True)) / sum(
        r.cost for r in later.runs
    )
    minutes, seconds = show.left(later, 160.0).removesuffix(" left").split(":")
    assert 170 <= 60 * int(minutes) + int(seconds) <= 190  # a quarter took a minute
    assert show.left(status(states=["done"] * 4), 200.0) == ""


def test_the_table_shows_what_goes_on_first():
    many = status(states=["done", "done", "running", "waiting"], losses=[2.5, 2.25, None, None], tries=[1, 1, 2, 0])
    console = Console(file=io.StringIO(), width=120)
    console.print(SweepTable(rows=2, stream=io.StringIO()).table(many, 0.0))
    text = " ".join(console.file.getvalue().split())
    assert many.runs[2].name in text and many.runs[0].name + " " not in text
    assert "running (try 2)" in text and "2 runs not shown" in text
    console.print(SweepTable(stream=io.StringIO()).table(many, 0.0))
    assert "2.2500" in console.file.getvalue()
