"""What Pallas' interpreter of JAX 0.12 lacks for the Hopper kernels: TMA copies that add, and wgmma of registers.

It is reached for by private names, as there are no others: when JAX knows both, this file goes.
"""

import threading
from functools import partial

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.state.types import AbstractRef

from moe.kernels.hopper import ring

LOCK = threading.Lock()


def teach(monkeypatch):
    """Let the interpreter know both, and the kernels that it does."""
    knows = partial(copy_smem_to_gmem, gpu_callbacks.copy_smem_to_gmem)
    monkeypatch.setattr(gpu_callbacks, "copy_smem_to_gmem", knows)
    plain = jaxpr_interpret.JaxprInterpreter._interpret_wgmma_ref_p
    monkeypatch.setattr(
        jaxpr_interpret.JaxprInterpreter, "_interpret_wgmma_ref_p", lambda *args: interpret_wgmma(plain, *args)
    )
    monkeypatch.setattr(ring, "LACKING", frozenset())


class Addition(gpu_callbacks.AsyncCopySmemToGmemTask):
    """Adds to device memory, one copy at a time as L2 does it: that additions have no order is not a race."""

    def __call__(self, tma_thread_id):
        memory = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        log = {"logging_info": self.logging_info}
        value, _, _ = memory.get_buffer_content(self.src_allocation_key, self.src_access, self.thread, **log)
        if memory.detect_races:
            self.clock.inc(tma_thread_id)
            self.write_clock = self.clock.copy()
        key = self.dst_allocation_key
        store = gpu_callbacks._clip_store_to_shape(self.dst_access, value, memory.buffer_shape_and_dtype(key).shape)
        if store is not None:
            access, value = store
            with LOCK:
                before, _, _ = memory.get_buffer_content(key, access, self.thread, **log)
                memory.store_buffer_content(key, access, before + value, self.thread, **log)
        self.post_write(tma_thread_id, memory)


def named(memory, key, transforms):
    """A buffer and the part of it that transforms leave."""
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    return key, memory.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))


def copy_smem_to_gmem(plain, **arguments):
    if arguments["reduction_op"] is None:
        return plain(**arguments)
    return add_smem_to_gmem(**arguments)


@gpu_callbacks.fail_on_exception
def add_smem_to_gmem(*, token, mesh_location, thread, source_info, predicate, reduction_op, commit_group, **buffers):
    del commit_group  # nor does the interpreter's own copy know groups
    assert reduction_op == "add" and predicate is None
    memory, where = gpu_callbacks._get_shared_memory(), {}
    for side in ("src", "dst"):
        parts = (buffers[f"{side}_{part}"] for part in ("allocation_key_as_array", "transforms"))
        where[f"{side}_allocation_key"], where[f"{side}_access"] = named(memory, *parts)
    clock = memory.incr_clock(thread) if memory.detect_races else None
    task = Addition(mesh_location=mesh_location, thread=thread, source_info=source_info, clock=clock, **where)
    memory.execute_async_task(task)
    return token


def interpret_wgmma(plain, self, eqn, token, get_invals):
    if isinstance(eqn.invars[1].aval, AbstractRef):
        return plain(self, eqn, token, get_invals)
    acc, a, b, *leaves = get_invals()
    trees = [eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in "acc a b".split()]
    acc_transforms, _, b_transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    done = callback.io_callback(
        partial(wgmma_of_registers, source_info=eqn.source_info),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        acc=(acc, acc_transforms),
        a=a,
        b=(b, b_transforms),
    )
    return done, []


@gpu_callbacks.fail_on_exception
def wgmma_of_registers(*, token, mesh_location, thread, acc, a, b, source_info):
    del mesh_location, source_info
    memory = gpu_callbacks._get_shared_memory()
    (total_key, total_access), (key, access) = named(memory, *acc), named(memory, *b)
    total, _, _ = memory.get_buffer_content(total_key, total_access, thread)
    right, _, _ = memory.get_buffer_content(key, access, thread)
    result = total + np.matmul(np.asarray(a), right, dtype=total.dtype)
    memory.store_buffer_content(total_key, total_access, result, thread)
    return token
