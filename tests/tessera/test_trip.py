"""How many files of the project a reader opens to follow one run: those with a call between `main` and its return."""

import cProfile
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import lm, lottery_digits
from tessera.infra.schema import completed

ROOT = Path(__file__).parent.parent.parent
REPORTS = (
    *("tessera/reports/", "tessera/planning/report.py", "tessera/tickets/report.py"),
    *("lottery/summary.py", "scaling/flops.py"),  # what pages show
)


def files_entered(call: Callable[[], object]) -> list[str]:
    """Files of the project with a call event while `call` runs, by name, `__init__` files and tests apart."""
    installed = sysconfig.get_paths()["purelib"]
    before = sys.getprofile()
    profile = cProfile.Profile(builtins=False)
    profile.enable()
    try:
        call()
    finally:
        profile.disable()
        sys.setprofile(before)
    entered = {row.code.co_filename for row in profile.getstats()}
    ours = [Path(name) for name in entered if name.startswith(str(ROOT)) and not name.startswith(installed)]
    found = [path.relative_to(ROOT).as_posix() for path in ours if path.name != "__init__.py"]
    return [name for name in sorted(found) if not name.startswith(("tests/", "."))]


@pytest.mark.long
def test_a_dense_training_passes_through_few_files(tmp_path):
    from tessera.cli import train
    from tessera.cli.main import Invocation

    config: ConfigDict = completed(train.SCHEMA, lm.get_config("tiny"))
    config.steps = 3
    config.optimizer.warmup = 1
    config.data.max_bytes = 200_000
    config.eval.batches = 1
    invocation = Invocation(config, "lm-tiny", str(tmp_path / "run"))
    found = files_entered(lambda: train.main(invocation))
    trip = [name for name in found if not name.startswith(REPORTS)]
    assert "tessera/models/transformer.py" in trip and "tessera/step.py" in trip
    assert len(trip) <= 19, "\n".join(trip)


@pytest.mark.long
def test_a_search_passes_through_few_files(tmp_path):
    from tessera.cli import find_ticket
    from tessera.cli.main import Invocation

    config: ConfigDict = completed(find_ticket.SCHEMA, lottery_digits.get_config())
    config.search.levels = 1
    config.seeds = (0,)
    config.train.steps = "20it"
    config.train.eval_every = 10
    config.model.hidden = (12, 8)
    invocation = Invocation(config, "lottery-digits", str(tmp_path / "run"))
    found = files_entered(lambda: find_ticket.main(invocation))
    trip = [name for name in found if not name.startswith(REPORTS)]
    assert "lottery/imp.py" in trip and "tessera/step.py" in trip
    assert len(trip) <= 21, "\n".join(trip)
