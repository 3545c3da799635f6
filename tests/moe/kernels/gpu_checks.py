"""Check and time the Hopper kernels on a GPU in ten minutes: `make test-gpu`.

Every check is a process of its own under a timeout, so that one that hangs or faults ends none of the others. They run
from the plainest product to a whole mixture, then times. A result is a line of JSON in --out, written when it comes.
Values are compared with float64 numpy. --backend=xla tries the script itself on a CPU.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[3])]
SIZES, ROWS, TOKENS = (30, 0, 135, 7), 180, 60
TOLERANCE = 0.01


def setting(k, n, *, gathered=False, seed=0):
    """x (NaN in rows past the sum unless they are gathered), w, sizes, row numbers and their weights."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(TOKENS if gathered else ROWS, k)), rng.normal(size=(len(SIZES), k, n)) / k**0.5
    if not gathered:
        x[sum(SIZES) :] = np.nan
    tokens = jnp.asarray(rng.integers(0, TOKENS, ROWS), jnp.int32)
    weights = jnp.asarray(rng.random(ROWS), jnp.float32)
    return *(jnp.asarray(v, jnp.bfloat16) for v in (x, w)), jnp.array(SIZES, jnp.int32), tokens, weights


def wide(x):
    import numpy as np

    return np.nan_to_num(np.asarray(x, np.float64))


def error(ours, theirs):
    """Largest difference, as a share of the largest value."""
    import numpy as np

    ours = np.asarray(ours, np.float64)
    assert ours.shape == theirs.shape and np.isfinite(ours).all(), "not finite, or of another shape"
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-9))


def product(backend, part, k, n, gathered=False):
    """One of the three products: "forward", "dx" or "dw"."""
    import jax
    import jax.numpy as jnp
    import kernel_reference as reference
    import numpy as np

    from moe.kernels import grouped_matmul

    x, w, sizes, tokens, _ = setting(k, n, gathered=gathered)
    gather = tokens if gathered else None
    f = partial(grouped_matmul, group_sizes=sizes, gather=gather, backend=backend)
    rows = wide(x) if gather is None else wide(x)[np.asarray(tokens)]
    if part == "forward":
        return error(jax.jit(f)(x, w), reference.grouped(rows, wide(w), SIZES))
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, n)), jnp.bfloat16)
    argument = {"dx": 0, "dw": 1}[part]
    held = (w, x)[argument]
    pull = jax.jit(lambda v, dy: jax.vjp(lambda v: f(*((v, held) if argument == 0 else (held, v))), v)[1](dy)[0])
    found = pull((x, w)[argument], dy)
    if part == "dw":
        return error(found, reference.contract(rows, wide(dy), SIZES))
    right = reference.grouped(wide(dy), wide(w).swapaxes(1, 2), SIZES)
    if gathered:
        right, by_row = np.zeros((TOKENS, k)), right
        np.add.at(right, np.asarray(tokens)[: sum(SIZES)], by_row[: sum(SIZES)])
    return error(found, right)


def combine(backend, deterministic):
    import jax
    import kernel_reference as reference
    import numpy as np

    from moe.kernels import Combine, grouped_matmul

    x, w, sizes, tokens, weights = setting(128, 136)
    f = partial(grouped_matmul, backend=backend, deterministic=deterministic)
    found = jax.jit(lambda x, w: f(x, w, sizes, epilogue=Combine(tokens, weights, TOKENS)))(x, w)
    live = np.arange(ROWS) < sum(SIZES)
    right = reference.combine(wide(x), wide(w), SIZES, tokens, np.where(live, weights, 0), TOKENS)
    return error(found, right)


def quantized(backend, dtype, block):
    import jax
    import kernel_reference as reference
    import numpy as np

    from moe.kernels import grouped_matmul, quantize

    x, w, sizes, *_ = setting(128, 136)
    q = quantize(w, dtype, block=block)
    found = jax.jit(partial(grouped_matmul, backend=backend))(x, q, sizes)
    meant = wide(q.values) * np.repeat(wide(q.scales), 128 // q.scales.shape[1], 1)
    return error(found, reference.grouped(wide(x), meant, SIZES))


def blocks(backend, block, part):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from moe.kernels import block_sparse_matmul, block_structure, to_blocks, to_dense

    rng = np.random.default_rng(0)
    structure = block_structure(rng.random((3, 4)) < 0.5, block, shape=(3 * block, 4 * block))
    shape = (structure.live, block, block)
    values = jnp.asarray(rng.normal(size=shape) / block**0.5, jnp.bfloat16)
    x, dy = (jnp.asarray(rng.normal(size=(200, n * block)), jnp.bfloat16) for n in (3, 4))
    w = wide(to_dense(values, structure))
    f = partial(block_sparse_matmul, structure=structure, backend=backend)
    if part == "forward":
        return error(jax.jit(f)(x, values), wide(x) @ w)
    if part == "dx":
        pull = jax.jit(lambda x, dy: jax.vjp(lambda x: f(x, values), x)[1](dy)[0])
        return error(pull(x, dy), wide(dy) @ w.T)
    pull = jax.jit(lambda b, dy: jax.vjp(lambda b: f(x, b), b)[1](dy)[0])
    right = to_blocks(jnp.asarray(wide(x).T @ wide(dy), jnp.float32), structure)
    return error(pull(values, dy), wide(right))


def mixture(backend, deterministic):
    """A mixture and its gradients: each token's experts one by one in float64, gradients against plain JAX."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from moe import experts, route

    params = experts.initialize(128, 192, 4, "swiglu", key=jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    x = jax.random.normal(jax.random.key(1), (96, 128), jnp.bfloat16)
    routing = route.top_k(jax.random.normal(jax.random.key(2), (96, 4)), 2)

    def run(backend):
        config = experts.MixtureConfig(backend=backend, deterministic=deterministic)
        f = lambda p, x: experts.mixture(p, x, routing, config)[0]  # noqa: E731
        out, pull = jax.jit(lambda p, x: jax.vjp(f, p, x))(params, x)
        return out, *jax.tree.leaves(pull(jnp.ones_like(out)))

    found = run(backend)
    right = np.zeros((96, 128))
    for token in range(96):
        for expert, weight in zip(wide(routing.experts_NK[token]), wide(routing.weights_NK[token]), strict=True):
            gate, up, down = (wide(params[name][int(expert)]) for name in ("gate", "up", "down"))
            g = wide(x[token]) @ gate
            right[token] += weight * ((g / (1 + np.exp(-g)) * (wide(x[token]) @ up)) @ down)
    worst = max(error(a, wide(b)) for a, b in zip(found[1:], run("xla")[1:], strict=True))
    # Gradients of both backends are rounded.
    return max(error(found[0], right), worst / 2)


def times(backend, m, k, n, groups):
    """Milliseconds (medians, in turns) of the three products and of the dense product of equal FLOPs."""
    import jax
    import jax.numpy as jnp
    import kernel_reference as reference
    import numpy as np

    from moe.kernels import grouped_matmul

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((m, k), (groups, k, n), (m, n))
    x, w, dy = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    sizes = reference.uneven(np.random.default_rng(0), groups, m)
    sizes[-1] += m - sizes.sum()
    f = partial(grouped_matmul, group_sizes=jnp.asarray(sizes), backend=backend)
    runs = {
        "forward": lambda x, w, dy: f(x, w),
        "dx": lambda x, w, dy: jax.vjp(lambda x: f(x, w), x)[1](dy)[0],
        "dw": lambda x, w, dy: jax.vjp(lambda w: f(x, w), w)[1](dy)[0],
        "dense": lambda x, w, dy: x @ w[0],
    }
    runs = {name: jax.jit(run) for name, run in runs.items()}
    taken = {name: [] for name in runs}
    for turn in range(11):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(x, w, dy))
            taken[name] += [time.perf_counter() - start] if turn else []
    found = {name: 1000 * float(np.median(each)) for name, each in taken.items()}
    return found | {"tflops": 2e-9 * m * k * n / found["forward"]}


# (name, function, arguments, seconds); in this order.
CHECKS = [
    *[(f"ungathered {part}", product, (part, 128, 192), 60) for part in ("forward", "dx", "dw")],
    *[(f"odd columns {part}", product, (part, 72, 40), 60) for part in ("forward", "dx", "dw")],
    *[(f"gathered forward K {k}", product, ("forward", k, 136, True), 60) for k in (64, 128, 256)],
    *[(f"gathered {part} K {k}", product, (part, k, 136, True), 60) for part in ("dw", "dx") for k in (64, 128, 256)],
    *[(f"combine {'in order' if fixed else 'in any order'}", combine, (fixed,), 60) for fixed in (True, False)],
    *[(f"{dtype} by {block or 'channel'}", quantized, (dtype, block), 60)
      for dtype in ("int8", "float8_e4m3fn") for block in (None, 64)],
    *[(f"blocks of {b} {part}", blocks, (b, part), 60) for b in (64, 128) for part in ("forward", "dx", "dw")],
    *[(f"mixture {'in order' if fixed else 'in any order'}", mixture, (fixed,), 90) for fixed in (True, False)],
    *[(f"times {m} x {k} x {n}, {e} experts", times, (m, k, n, e), 90)
      for m, k, n, e in ((8192, 4096, 14336, 8), (32768, 2048, 1024, 64), (65536, 4096, 14336, 8))],
]  # fmt: skip


def one(name, backend):
    """Run a check in this process and print its result, a line of JSON."""
    import jax

    from moe.kernels import implementations

    # The kernels themselves, not what would run in their place.
    implementations._here = lambda backend: False
    _, check, arguments, _ = next(each for each in CHECKS if each[0] == name)
    found = check(backend, *arguments)
    result = {"device": jax.devices()[0].device_kind}
    result |= found if isinstance(found, dict) else {"error": found, "ok": found <= TOLERANCE}
    print(json.dumps({"ok": True} | result))


def child(command, seconds):
    """Run a process and return what its last line says, or how it ended."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"ok": False, "why": f"no result in {seconds:.0f} s"}
    if done.returncode:
        return {"ok": False, "why": f"exit code {done.returncode}: {done.stderr.strip()[-500:]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-checks.jsonl"), help="one line of JSON a check")
    parser.add_argument("--seconds", type=float, default=570, help="of all checks together")
    parser.add_argument("--backend", default="gpu")
    parser.add_argument("--only", default="", help="checks whose name has this in it")
    parser.add_argument("--one", help="run this check here (what the script starts itself with)")
    args = parser.parse_args(argv)
    if args.one:
        return one(args.one, args.backend)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + args.seconds, 0
    with args.out.open("w", encoding="utf-8") as out:
        for name, _, _, seconds in CHECKS:
            if args.only not in name:
                continue
            start = time.monotonic()
            if end - start < 5:
                result = {"ok": False, "why": "no time left"}
            else:
                command = [sys.executable, str(HERE), f"--one={name}", f"--backend={args.backend}"]
                result = child(command, min(seconds, end - start))
            line = json.dumps({"check": name} | result | {"seconds": round(time.monotonic() - start, 1)})
            print(line, flush=True)
            print(line, file=out, flush=True)
            failed += not result["ok"]
    return sys.exit(f"{failed} checks failed, see {args.out}" if failed else 0)


if __name__ == "__main__":
    main()
