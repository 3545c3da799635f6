"""Checkpoints that survive a kill at any moment: atomic, asynchronous, and checked when they are read.

Orbax writes each checkpoint to a temporary directory and renames it, so a half-written one is never listed. Every one
carries checksums (`tessera.infra.artifacts`), and `Checkpoints.restore_latest` walks back past a damaged one. Only
these two modules import Orbax.

`Checkpoints` belongs to the process that trains: opening it removes what a killed save left. Everybody else looks
through `CheckpointReader`, which leaves the directory as it is, so that a run may be read while it trains.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import preservation_policy

from sharding.rules import path_name
from tessera.infra.logger import read_object, write_text
from tessera.infra.remote import is_mirror

BEST = "loss"  # the validation metric that ranks checkpoints; lower is better
TRIES = 10  # how often a checkpoint may be replaced by a newer one while it is read


ENTRIES = {"state", "meta", "metrics", "_CHECKPOINT_METADATA", "commit_success.txt"}  # of a saved directory


class CheckpointDamaged(RuntimeError):
    """A checkpoint that is truncated, altered or unreadable."""


class CheckpointMismatch(ValueError):
    """A sound checkpoint of another model or optimizer."""


class NotOurs(FileExistsError):
    """Something that would be removed or replaced and was not written by this code."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every: steps between saves; 0 saves at the end and on SIGTERM only.
      keep: newest checkpoints that stay.
      best: checkpoints of lowest validation loss that stay besides.
      asynchronous: write in the background while training goes on.
    """

    every: int = 0
    keep: int = 3
    best: int = 1
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1 or self.best < 0:
            raise ValueError(
                f"every >= 0, keep >= 1 and best >= 0 expected, got {self.every}, {self.keep}, {self.best}"
            )


@dataclass(frozen=True)
class Restored:
    """A checkpoint read back: its step, arrays, data iterator state and the rest, and the damaged ones passed over."""

    step: int
    state: PyTree
    data: Any
    extra: dict[str, Any]
    skipped: tuple[tuple[int, str], ...] = ()


class CheckpointReader:
    """Reads the checkpoints of a run, which may be training: nothing in its directory is made, moved or removed."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory).absolute()

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending; none if there is no directory."""
        try:
            return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())
        except FileNotFoundError:
            return []

    def _read(self, step: int, args: ocp.args.Composite) -> Any:
        return open_item(self.directory / str(step), args)

    def restore(self, step: int, like: PyTree = None) -> Restored:
        """Read one checkpoint.

        Args:
          step: one of `steps()`.
          like: pytree of arrays or `jax.ShapeDtypeStruct`s with the structure, shapes, dtypes and shardings wanted.
            None gives nested dicts and lists, sharded as they were saved: enough to look at a run without its
            model.

        Raises:
          CheckpointDamaged: it cannot be read or its checksums differ.
          CheckpointMismatch: it is sound but holds other arrays than `like`.
        """
        like = abstract(like)
        name = f"checkpoint {step} in {self.directory}"

        def read(args: ocp.args.Composite) -> Any:
            return self._read(step, args)

        meta = read_meta(read, name)
        state = read_state(read, like, meta, name)
        return Restored(step, state, meta["data"], meta["extra"])

    def restore_whole(self, step: int) -> Restored:
        """Read one checkpoint as NumPy arrays, whatever devices it was saved from; same errors as `restore`."""

        def wanted(leaf: Any) -> np.ndarray:  # its shape alone is looked at
            return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)

        try:
            found: Any = ocp.StandardCheckpointHandler().metadata(epath.Path(self.directory / str(step) / "state"))
            like = jax.tree.map(wanted, getattr(found, "tree", found))
        except Exception as error:  # Orbax raises many kinds for files it cannot read
            raise CheckpointDamaged(f"checkpoint {step} in {self.directory} is damaged: {short(error)}") from error
        try:
            return self.restore(step, like)
        except CheckpointMismatch as error:  # two of its own descriptions differ
            raise CheckpointDamaged(f"checkpoint {step} in {self.directory} is damaged: {error}") from error

    def restore_newest(self) -> Restored:
        """Read the newest checkpoint as NumPy arrays, as `restore_whole` does.

        A run that trains meanwhile may remove the checkpoint that is being read: it has a newer one then, which is read
        instead.

        Raises:
          FileNotFoundError: there is no checkpoint.
          CheckpointDamaged: the newest one cannot be read, or newer ones came faster than they could be read.
        """
        for _ in range(TRIES):
            step = agreed(max(self.steps(), default=-1))  # processes that look at different moments read the same one
            if step < 0:
                raise FileNotFoundError(f"no checkpoint in {self.directory}")
            found, problem = None, None
            try:
                found = self.restore_whole(step)
            except CheckpointDamaged as error:
                problem = error
            if agreed(found is not None, all_of=True) and found is not None:
                return found
            # Only a newer checkpoint, or a trainer that found it damaged, makes a run remove its newest one.
            if agreed(max(self.steps(), default=-1)) == step:
                raise problem or CheckpointDamaged(f"checkpoint {step} in {self.directory} is damaged for a process")
        raise CheckpointDamaged(
            f"{TRIES} checkpoints in {self.directory} were removed while they were read: the run there saves faster; "
            "read it when it has ended, or train with a larger checkpoint.keep or checkpoint.every"
        )

    def restore_at(self, step: int = 0) -> Restored:
        """Read the checkpoint of a step as `restore_whole` does, for 0 the newest.

        Raises:
          FileNotFoundError: there is no checkpoint of this step; those that are there are named.
          CheckpointDamaged: it cannot be read.
        """
        if not step:
            return self.restore_newest()
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; there: {there}")
        return self.restore_whole(step)


class Checkpoints(CheckpointReader):
    """The checkpoints of the run that this process trains, by step; to look at another run use `CheckpointReader`.

    Opening it makes the directory and removes what a killed save left there. Call every method from every process; it
    is a context manager. Where each process has a directory of its own (`tessera.infra.remote.mirrored`), the first
    one gathers the state and writes all of it.

    Raises:
      NotOurs: the directory has numbered directories, which would be removed as old checkpoints, and they are no
        checkpoints of a run.
    """

    def __init__(self, directory: Path | str, config: CheckpointConfig = CheckpointConfig()):
        super().__init__(directory)
        self.config = config
        self._apart = jax.process_count() > 1 and is_mirror(directory)
        for step in self.steps() if self.directory.is_dir() else ():
            refuse_foreign(self.directory / str(step))
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager | None:
        self._mend_ranks()
        if self._apart and jax.process_index():
            return None
        among = ocp.options.MultiprocessingOptions()
        if self._apart:
            self.directory.mkdir(parents=True, exist_ok=True)
            among = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="first")
        policies: list[Any] = [preservation_policy.LatestN(self.config.keep)]
        if self.config.best:
            best = preservation_policy.BestN(
                get_metric_fn=_rank, reverse=True, n=self.config.best, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=_rank,
            best_mode="min",
            enable_async_checkpointing=self.config.asynchronous,
            cleanup_tmp_directories=True,
            create=not self._apart,
            multiprocessing_options=among,
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _mend_ranks(self) -> None:
        """Orbax cannot open a directory where one rank is unreadable: such a checkpoint becomes an unranked one."""
        if jax.process_index() == 0 or self._apart:
            for path in self.directory.glob("*/metrics/metrics"):
                try:
                    float(json.loads(path.read_text(encoding="utf-8"))[BEST])
                except (ValueError, TypeError, LookupError) as error:
                    logging.warning("the validation loss in %s is unreadable (%s)", path, short(error))
                    write_text(path, json.dumps({BEST: math.inf}))
        barrier("tessera:mend_ranks")

    def _read(self, step: int, args: ocp.args.Composite) -> Any:
        if self._apart or self._manager is None:
            return super()._read(step, args)
        return self._manager.restore(step, args=args)

    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss; None if none was saved with one."""
        ranks = self._ranks()
        return min(ranks, key=ranks.__getitem__, default=None)

    def _ranks(self) -> dict[int, float]:
        ranks = {step: self._metrics(step).get(BEST, math.inf) for step in self.steps()}
        return {step: rank for step, rank in ranks.items() if math.isfinite(rank)}

    def _metrics(self, step: int) -> dict[str, float]:
        file = self.directory / str(step) / "metrics" / "metrics"
        return read_object(file) if file.exists() else {}

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        data: Any = None,
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Start saving; arrays are copied before this returns, files are written in the background.

        Args:
          step: number of finished steps. A step that exists already is left alone.
          state: pytree of arrays. They may be donated to the next step once this returns.
          data: JSON-able state of the data iterator. Processes draw equal batches, so the first one's state serves all.
          extra: further JSON-able values.
          metrics: validation metrics at this step; a finite "loss" ranks the checkpoint for `best`.
        """
        known = self._manager is not None and step in self._manager.all_steps()
        if agreed(known) if self._apart else known:
            return
        state = gathered(state) if self._apart else state
        if self._manager is None:
            return
        ranked = metrics is not None and BEST in metrics and math.isfinite(metrics[BEST])
        rank = {BEST: float(metrics[BEST]) if ranked and metrics is not None else math.inf}
        self._manager.save(
            step, args=save_args(state, {"data": data, "extra": dict(extra or {})}), metrics=rank, force=True
        )

    def restore_latest(self, like: PyTree) -> Restored | None:
        """Read the newest sound checkpoint, or return None if there is no checkpoint at all.

        Damaged ones are logged as warnings, reported in `skipped`, and moved to the directory `<name>_damaged`.

        Raises:
          CheckpointDamaged: there are checkpoints and every one is damaged.
          CheckpointMismatch: the newest sound one belongs to another model or optimizer.
        """
        self.wait()
        skipped: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            try:
                found = self.restore(step, like)
            except CheckpointDamaged as error:
                logging.warning("%s; trying the one before it", error)
                skipped.append((step, str(error)))
                continue
            self._set_aside([step for step, _ in skipped])
            return Restored(found.step, found.state, found.data, found.extra, tuple(skipped))
        if skipped:
            steps = ", ".join(str(step) for step, _ in skipped)
            raise CheckpointDamaged(
                f"every checkpoint in {self.directory} is damaged (steps {steps}): {skipped[0][1]}. "
                "Remove that directory to train from the start"
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            place = self.directory.with_name(self.directory.name + "_damaged")
            place.mkdir(exist_ok=True)
            for step in steps:
                number = sum(path.name.split(".")[0] == str(step) for path in place.iterdir())
                os.replace(self.directory / str(step), place / (f"{step}.{number}" if number else str(step)))
        barrier("tessera:set_aside")
        self._reopen()

    def _reopen(self) -> None:
        self.close()
        self._manager = self._open()

    def rank(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the validation metrics of a checkpoint that was saved before they were known, and what they change.

        A checkpoint that was the best one so far and no longer is goes.

        Args:
          step: one of `steps()`.
          metrics: as for `save`.
        """
        self.wait()
        values = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(values.get(BEST, math.inf)):
            return
        self._write_metrics(step, values)
        if self._manager is None:
            return
        steps = self.steps()
        ranks = self._ranks()
        retained = {*steps[-self.config.keep :], *sorted(ranks, key=ranks.__getitem__)[: self.config.best]}
        for at in steps:
            if at not in retained:
                self._manager.delete(at)

    def _write_metrics(self, step: int, values: Mapping[str, float]) -> None:
        barrier("tessera:rank")
        if jax.process_index() == 0:
            write_text(self.directory / str(step) / "metrics" / "metrics", json.dumps(dict(values)))
        barrier("tessera:rank:done")
        self._reopen()  # Orbax reads ranks when it opens a directory

    def measured(self, step: int) -> dict[str, float]:
        """Validation metrics that `rank` recorded for a checkpoint; empty if there are none."""
        found = {name: float(value) for name, value in self._metrics(step).items()}
        return found if BEST in found and all(math.isfinite(value) for value in found.values()) else {}

    def wait(self) -> None:
        """Block until the save under way is on disk.

        Raises:
          Exception: what went wrong in writing it.
        """
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish the save under way and stop the threads."""
        if self._manager is not None:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rank(metrics: Mapping[str, float]) -> float:
    return metrics[BEST]


# The format of a saved directory, which artifacts share.


def refuse_foreign(path: Path) -> None:
    """Raise NotOurs if something stands at `path` that is not, judged by its entries, a directory of this module."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise NotOurs(f"{path} is not a directory that a run saved; move it away, or use another directory")
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in ENTRIES)
    if foreign:
        raise NotOurs(
            f"{path} stands where a run saves and holds what no run wrote: {', '.join(foreign[:10])}; move it away, "
            "or use another directory"
        )


def open_item(path: Path, args: Any) -> Any:
    """Read items of a directory that Orbax wrote, and leave the directory as it is."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=args)


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a pytree without its arrays (NumPy arrays stay, and restore as NumPy)."""

    def leaf(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(leaf, tree)


def barrier(name: str) -> None:
    """Wait until every process is here, if there are several; `name` must be the same on all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(value: int | bool, *, all_of: bool = False) -> int:
    """One value for all processes: the first one's, or with `all_of` whether it is true on every one."""
    if jax.process_count() == 1:
        return int(value)
    if all_of:
        return int(np.all(multihost_utils.process_allgather(np.int32(value))))
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def gathered(tree: PyTree) -> PyTree:
    """Whole NumPy arrays of a pytree on the first process, None elsewhere; call it on every process."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x) if jax.process_index() == 0 else None

    return jax.tree.map(whole, tree)


def save_args(state: PyTree, meta: dict[str, Any]) -> ocp.args.Composite:
    """What Orbax is to write: the arrays of `state`, and `meta` with their checksums, itself under a checksum."""
    text = json.dumps(meta | {"arrays": checksums(state)})
    sealed = {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(sealed))


def read_meta(read: Any, name: str) -> dict[str, Any]:
    """What `save_args` wrote as meta; `read` restores items, `name` is for messages. Raises CheckpointDamaged."""
    try:
        sealed = read(ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        text = sealed["text"]
        sound = hashlib.sha256(text.encode()).hexdigest() == sealed["sha256"]
    except Exception as error:  # Orbax raises many kinds for files it cannot read
        raise CheckpointDamaged(f"{name} is damaged: its description cannot be read ({short(error)})") from error
    if not sound:
        raise CheckpointDamaged(f"{name} is damaged: the checksum of its description differs")
    return json.loads(text)


def read_state(read: Any, like: PyTree, meta: dict[str, Any], name: str) -> PyTree:
    """The arrays, checked against their description; `like` None takes them as they come.

    Raises:
      CheckpointDamaged: they cannot be read or are not those of the description.
      CheckpointMismatch: `like` has other paths, shapes or dtypes.
    """
    wanted = (
        None
        if like is None
        else {path_name(path): signature(x) for path, x in jax.tree_util.tree_leaves_with_path(like)}
    )
    saved = {path: (dtype, shape) for path, (dtype, shape, _, _) in meta["arrays"].items()}
    if wanted is not None and wanted != saved:
        paths = [path for path in saved | wanted if saved.get(path) != wanted.get(path)]
        shown = "; ".join(
            f"{path}: saved {_show(saved.get(path))}, wanted {_show(wanted.get(path))}" for path in paths[:5]
        )
        raise CheckpointMismatch(f"{name} holds other arrays than this run ({len(paths)} differ): {shown}")
    try:
        state = read(ocp.args.Composite(state=ocp.args.StandardRestore(like))).state
    except Exception as error:
        raise CheckpointDamaged(f"{name} is damaged: its arrays cannot be read ({short(error)})") from error
    found = checksums(state)
    wrong = [path for path in found | meta["arrays"] if found.get(path) != meta["arrays"].get(path)]
    if wrong:
        raise CheckpointDamaged(f"{name} is damaged: checksums differ for {', '.join(wrong[:5])}")
    return state


def _show(signature: tuple[str, list[int]] | None) -> str:
    return "nothing" if signature is None else f"{signature[0]}{signature[1]}"


def short(error: Exception) -> str:
    """Kind and first line of an error."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:160]}"


def checksums(tree: PyTree) -> dict[str, list]:
    """Dtype, shape and two 32-bit checksums of each leaf, by path.

    The checksums are integer sums modulo 2^32 of the array's units of up to 32 bits, plain and weighted by position, so
    they are equal under every sharding and device, and any single altered unit changes the first. They are computed on
    the array's devices.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {path_name(path): leaf for path, leaf in leaves}
    on_device = {name: leaf for name, leaf in arrays.items() if isinstance(leaf, jax.Array)}
    sums = jax.device_get(_device_sums(on_device))
    sums |= {name: _sums(_units_numpy(np.asarray(leaf)), np) for name, leaf in arrays.items() if name not in on_device}
    return {name: [*signature(leaf), int(sums[name][0]), int(sums[name][1])] for name, leaf in arrays.items()}


def signature(leaf: Any) -> tuple[str, list[int]]:
    """Dtype and shape of an array, a scalar or a `jax.ShapeDtypeStruct`, as JSON values."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return str(leaf.dtype), list(leaf.shape)


@jax.jit
def _device_sums(arrays: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {name: _sums(_units_jax(array), jnp) for name, array in arrays.items()}


def _sums(units: Any, xp: Any) -> tuple[Any, Any]:
    weights = xp.ones((1,) * units.ndim, np.uint32)
    for axis, size in enumerate(units.shape):
        shape = [1] * units.ndim
        shape[axis] = size
        # Even multipliers far apart: neighbours on any axis get different weights, and every weight is odd.
        multiplier = np.uint32((0x9E3779B2 + 0x3C6EF372 * axis) & 0xFFFFFFFE)
        weights = weights + xp.arange(size, dtype=np.uint32).reshape(shape) * multiplier
    units = units.astype(np.uint32)
    return xp.sum(units, dtype=np.uint32), xp.sum(units * weights, dtype=np.uint32)


def _units_numpy(x: np.ndarray) -> np.ndarray:
    if x.dtype == bool:
        return x.astype(np.uint8)[..., None]
    if _bits(x.dtype) < 8:
        return x.astype(np.int32).astype(np.uint32)[..., None]
    x = np.ascontiguousarray(x).reshape(x.shape)
    return x[..., None].view(f"u{min(x.dtype.itemsize, 4)}")


def _units_jax(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        return x.astype(np.uint8)[..., None]
    if jnp.issubdtype(x.dtype, np.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
        units = jax.lax.bitcast_convert_type(x, np.uint32)
        return units.reshape(*x.shape[:-1], -1)
    bits = _bits(x.dtype)
    if bits < 8:
        return x.astype(np.int32).astype(np.uint32)[..., None]
    units = jax.lax.bitcast_convert_type(x, {8: np.uint8, 16: np.uint16}.get(bits, np.uint32))
    return units if bits > 32 else units[..., None]


def _bits(dtype: Any) -> int:
    """Width of an element: 4 for int4, which NumPy stores in a byte."""
    if jnp.issubdtype(dtype, np.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, np.floating) else np.dtype(dtype).itemsize * 8
