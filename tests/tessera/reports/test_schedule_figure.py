import pytest

from sharding.pipeline.timelines import Ticks, interleaved, one_f_one_b, zero_bubble
from tessera.reports.schedule_figure import schedule_figure


def test_figure_has_a_box_where_the_table_has_work():
    schedules = [one_f_one_b(3, 4, Ticks(B=2)), interleaved(3, 3, 2), zero_bubble(3, 5)]
    figure = schedule_figure(schedules)
    for ax, schedule in zip(figure.axes, schedules, strict=True):
        boxes = {patch.get_gid(): patch for patch in ax.patches if patch.get_gid()}
        spans = {
            f"{w.kind}{w.microbatch}.{w.chunk}@{s}": t for s, f in enumerate(schedule.spans()) for w, t in f.items()
        }
        assert set(boxes) == set(spans)
        for key, span in spans.items():
            assert boxes[key].get_x() == span.start / schedule.chunks
            assert boxes[key].get_width() == pytest.approx((span.end - span.start) / schedule.chunks)
        assert schedule.name in ax.get_title("left")
    assert len({ax.get_xlim() for ax in figure.axes}) == 1, "one time axis"
    figure.canvas.draw()
    with pytest.raises(ValueError, match="at least one"):
        schedule_figure([])
