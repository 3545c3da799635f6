"""Run a sweep, resumable at any point: every readout an artifact, one CSV in the order of the plan.

A run's artifacts are stored by the hash of its settings (`scaling.sweeps.store`). The CSV is written from them in the
order of the plan (a run that finishes early waits for the earlier ones), so that the same plan gives the same bytes
after any interruption and in whatever order its runs ended.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scaling.sweeps.executors import Executor, Job
from scaling.sweeps.plan import PlannedRun
from scaling.sweeps.store import Row, Store, TrainFn, carry_out, write_text


class RunFailed(RuntimeError):
    """Runs that failed in every try; the message names them and the last error of each.

    Example:
      >>> from scaling.sweeps import RunFailed
      >>> raise RunFailed("1 of 4 runs failed; start again to retry: w16: out of memory")
      Traceback (most recent call last):
        ...
      scaling.sweeps.sweep.RunFailed: 1 of 4 runs failed; start again to retry: w16: out of memory
    """


def table(rows: Iterable[Row]) -> str:
    """Format rows as CSV text, floats as Python writes them.

    Raises:
      ValueError: rows with different columns.
    """
    rows = list(rows)
    if not rows:
        return ""
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"run {row.get('run')!r} has columns {list(row)}, the first run {columns}")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([repr(float(v)) if isinstance(v, float) else v for v in row.values()] for row in rows)
    return buffer.getvalue()


@dataclass(frozen=True)
class SweepConfig:
    """Options of `run_sweep`.

    Attributes:
      retries: how often a failed run is started again.
      poll: seconds between polls of the running jobs.

    Example:
      >>> from scaling.sweeps import SweepConfig
      >>> SweepConfig(retries=2).poll
      0.2
    """

    retries: int = 1
    poll: float = 0.2


@dataclass
class Status:
    """Progress of a sweep, for displays.

    Attributes:
      runs: the plan.
      states: of every run: "waiting", "running", "done", "diverged", "failed" or "not needed".
      steps: done by every run.
      losses: last loss of every run, None before the first readout.
      tries: how often every run was started.
      errors: last error of the runs that failed.
    """

    runs: Sequence[PlannedRun]
    states: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    tries: list[int] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)

    def __post_init__(self):
        self.runs, planned = [], self.runs
        self.extend(planned)

    def extend(self, runs: Sequence[PlannedRun]) -> None:
        """Add runs to the plan, all waiting."""
        self.runs = [*self.runs, *runs]
        count = len(runs)
        self.states += ["waiting"] * count
        self.steps += [0] * count
        self.losses += [None] * count
        self.tries += [0] * count


def run_sweep(
    runs: Sequence[PlannedRun],
    train: TrainFn,
    store: Store,
    executor: Executor,
    path: Path | str,
    config: SweepConfig = SweepConfig(),
    *,
    enough: Callable[[list[Row]], bool] | None = None,
    more: Callable[[list[Row], Sequence[PlannedRun]], Sequence[PlannedRun]] | None = None,
    watch: Callable[[Status], None] = lambda status: None,
) -> list[Row]:
    """Run a table of training runs, skipping readouts that exist.

    Args:
      runs: the plan; its order is the CSV's.
      train: trains one run, see `scaling.sweeps.store.TrainFn`.
      store: of the artifacts; existing readouts are not trained again.
      executor: where runs are carried out.
      path: of the CSV. Runs that diverged are listed in `diverged.csv` beside it, and not started again.
      config: retries and polling.
      enough: called with the rows so far after every run, in the order of the plan; True ends the sweep, and later runs
        are left out of the CSV even if they are finished.
      more: called with the rows and the runs so far whenever all runs have ended, returns further runs; the sweep ends
        when there are none. Runs of the same settings may come again with other readouts. It must be a pure function:
        a restart calls it again.
      watch: called with the progress after every poll.

    Returns:
      The rows of the CSV.

    Raises:
      RunFailed: after everything else is done, if runs failed more often than `config.retries`, or all diverged.

    Example:
      A training function in a module of its own, since processes import it:

      >>> import pathlib, sys, tempfile
      >>> from scaling.sweeps import Family, PlanConfig, ExecutorConfig, Store, make_executor, plan_runs, run_sweep
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> sys.path.insert(0, str(folder))
      >>> _ = (folder / "my_training.py").write_text(
      ...     "def train(run, directory, report):\\n"
      ...     "    for readout in run.readouts:\\n"
      ...     "        yield readout, {'loss': 1.7 + run.columns['params'] ** -0.3}\\n"
      ... )
      >>> import my_training
      >>> runs = plan_runs(Family(), PlanConfig(widths=(16, 32), budgets=(1e12, 2e12)), {"data": "none"})
      >>> executor = make_executor(ExecutorConfig(slots=2), folder / "logs")
      >>> rows = run_sweep(runs, my_training.train, Store(folder / "runs"), executor, folder / "runs.csv")
      >>> len(rows), sorted(rows[0])[:4]
      (4, ['batch', 'budget', 'flops', 'layers'])
    """
    state = _Sweep(runs, train, store, executor, Path(path), config, enough, more)
    try:
        while state.turn():
            watch(state.status)
            executor.wait(config.poll)
        watch(state.status)
    finally:
        executor.stop([job for _, job in state.running])
    if not state.rows and "diverged" in state.status.states and not state.status.errors:
        raise RunFailed(f"all runs diverged before their first readout; see {state.path.with_name('diverged.csv')}")
    if state.status.errors:
        lines = [f"  {state.runs[i].name}: {error}" for i, error in sorted(state.status.errors.items())]
        raise RunFailed(f"{len(lines)} of {len(state.runs)} runs failed; start again to retry:\n" + "\n".join(lines))
    return state.rows


class _Sweep:
    """The state of one `run_sweep`."""

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        train: TrainFn,
        store: Store,
        executor: Executor,
        path: Path,
        config: SweepConfig,
        enough: Callable[[list[Row]], bool] | None,
        more: Callable[[list[Row], Sequence[PlannedRun]], Sequence[PlannedRun]] | None,
    ):
        self.runs, self.train, self.store, self.executor = list(runs), train, store, executor
        self.path, self.config, self.enough, self.more = path, config, enough, more
        self.status = Status(self.runs)
        self.running: list[tuple[int, Job]] = []
        self.waiting = list(range(len(self.runs)))
        self.rows: list[Row] = []
        self.diverged: list[Row] = []
        self.next = 0  # the first run that is not in the CSV
        self.over = False
        self._check(self.runs)
        self._write("")
        self.path.with_name("diverged.csv").unlink(missing_ok=True)

    def _check(self, runs: Sequence[PlannedRun]) -> None:
        """Refuse two runs of the same settings side by side: they would write the same files."""
        keys = [run.key for run in runs]
        if len(set(keys)) < len(keys):
            twice = sorted({run.name for run in runs if keys.count(run.key) > 1})
            raise ValueError(f"runs with the same settings are planned twice: {', '.join(twice)}")

    def _grow(self) -> None:
        """Call `more` when all runs have ended."""
        while self.more and not self.over and self.next == len(self.runs):
            further = list(self.more(self.rows, self.runs))
            if not further:
                return
            self._check(further)
            self.waiting += range(len(self.runs), len(self.runs) + len(further))
            self.runs += further
            self.status.extend(further)
            self._append()

    def turn(self) -> bool:
        """Poll jobs, write rows, start runs; return whether there is more to do."""
        self._collect()
        self._append()
        self._grow()
        if self.over:
            for i, state in enumerate(self.status.states):
                if state in ("waiting", "running") and i >= self.next:
                    self.status.states[i] = "not needed"
            return False
        self._start()
        return bool(self.running or self.waiting)

    def _collect(self) -> None:
        """Collect finished jobs; a failed one is queued again or given up."""
        for i, job in list(self.running):
            run = self.runs[i]
            self._look(i)
            if not job.done():
                continue
            self.running.remove((i, job))
            missing = self.store.missing(run)
            error = job.error() or (f"{len(missing)} readouts are missing" if missing else "")
            if not error:
                self._end(i)
                self.status.errors.pop(i, None)
            elif self.status.tries[i] <= self.config.retries:
                self.status.states[i] = "waiting"
                self.waiting.insert(0, i)
            else:
                self.status.states[i], self.status.errors[i] = "failed", error

    def _end(self, i: int) -> None:
        """Mark a run that has no readout missing."""
        if self.store.divergence(self.runs[i]):
            self.status.states[i] = "diverged"
        else:
            self.status.states[i], self.status.steps[i] = "done", self.runs[i].steps

    def _look(self, i: int) -> None:
        rows = self.store.rows(self.runs[i])
        self.status.losses[i] = rows[-1].get("loss") if rows else None
        self.status.steps[i] = min(self.store.steps_done(self.runs[i]), self.runs[i].steps)

    def _append(self) -> None:
        """Append the rows of the next runs in the plan's order; a failed run is skipped."""
        while self.next < len(self.runs) and not self.over:
            i = self.next
            if self.status.states[i] == "waiting" and not self.store.missing(self.runs[i]):
                self._look(i)
                self._end(i)
                self.waiting.remove(i)
            if self.status.states[i] not in ("done", "diverged", "failed"):
                break
            self.next += 1
            new = self.store.rows(self.runs[i]) if self.status.states[i] != "failed" else []
            self.rows += new
            self._write(table(self.rows))
            if self.status.states[i] == "diverged":
                self.diverged.append(self.store.divergence(self.runs[i]) or {})
                write_text(self.path.with_name("diverged.csv"), table(self.diverged))
            self.over = bool(self.enough and new and self.enough(self.rows))

    def _write(self, text: str) -> None:
        # Appended where the file is a prefix of the text; else (a line cut short by a kill) replaced.
        old = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        if self.path.exists() and text.startswith(old):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text[len(old) :])
        else:
            write_text(self.path, text)

    def _start(self) -> None:
        """Start waiting runs in free slots; runs that are complete are not started."""
        free = self.executor.slots - len(self.running)
        chosen: list[int] = []
        while self.waiting and len(chosen) < free:
            i = self.waiting.pop(0)
            if not self.store.missing(self.runs[i]):
                self._look(i)
                self._end(i)
                continue
            chosen.append(i)
        if chosen:
            tasks = [(carry_out, (self.train, self.runs[i], self.store.directory)) for i in chosen]
            for i, job in zip(chosen, self.executor.submit(tasks), strict=True):
                self.running.append((i, job))
                self.status.states[i] = "running"
                self.status.tries[i] += 1
