"""The search over factorings of a number of devices."""

from sharding.analysis.search import Judged, plans, rank
from sharding.errors import PlanError
from sharding.plan import Plan


def test_every_factoring_is_looked_at_once_and_the_fastest_that_fits_wins():
    seen = list(plans(8, Plan(zero=1), axes=("dp", "fsdp", "tp")))
    assert {plan.axes for plan in seen} >= {"dp=8", "fsdp=8", "tp=8", "dp=2, fsdp=2, tp=2"} and len(seen) == 10
    assert len(set(seen)) == 10 and all(plan.devices == 8 and plan.zero == 1 for plan in seen)
    assert all(plan.sequence == (plan.size("tp") > 1) for plan in seen)
    piped = [plan for plan in plans(8, Plan()) if plan.axes == "pp=8"]
    assert [plan.microbatches for plan in piped] == [8, 16, 32, 64, 128, 256]

    def judge(plan):
        if plan.size("tp") == 8:
            raise PlanError("8 heads do not divide by tp=16", "heads by tp")
        return Judged(plan, 100 / plan.size("fsdp"), 1.0 * plan.size("tp"), float(plan.size("dp")))

    ranking = rank(seen, judge, 60.0)
    assert ranking.fits[0].plan.axes == "fsdp=8" and ranking.smallest.plan.axes == "fsdp=8"
    assert (ranking.tried, ranking.refused, ranking.too_large, len(ranking.fits)) == (10, 1, 3, 6)
    assert ranking.reasons == (("heads by tp", 1),)


def test_an_interleaved_schedule_holds_its_virtual_stages_where_there_are_stages():
    for plan in plans(4, Plan(schedule="interleaved", virtual=3)):
        expected = ("interleaved", 3) if plan.size("pp") > 1 else ("1f1b", 1)
        assert (plan.schedule, plan.virtual) == expected
