"""Split the backward pass of a layer into the gradient of its input (B) and that of its weights (W), in its jaxpr.

Zero-bubble schedules (Qi et al. 2023, section 2) run W later than B, in the bubbles. A layer and its vector-Jacobian
product are traced together, and the equations divided by what needs them: F computes the output; B what the gradient of
the input needs besides, and all other equations that prepare the products of W; W these products and what follows them.
What a later part needs of an earlier one are residuals, arrays that the caller holds in between. Values that follow
from parameters and the microbatch alone (casts, gathered parameters, masks) are never residuals: each part computes
them again.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import PyTree

CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
"""Primitives whose bodies are divided too."""

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")
"""Products; so is, of what has bodies of its own (loops, kernels), every equation."""

F, B, W = range(3)


class SplitLayer(NamedTuple):
    """Parts of a layer; residuals are flat lists of arrays.

    Attributes:
      forward: (params, micro, x) -> (y, residuals of F).
      backward: (params, micro, residuals of F, gradient of y) -> (gradient of x, residuals of B).
      weights: (params, micro, residuals of B) -> gradients of the parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sharding.pipeline import split_layer
      >>> layer = lambda params, x, micro: jnp.tanh(x @ params["w"])
      >>> params, x = {"w": jnp.eye(2)}, jnp.array([[0.5, 0.25]])
      >>> split = split_layer(layer, params, x, {})
      >>> y, saved = split.forward(params, {}, x)
      >>> d_x, rest = split.backward(params, {}, saved, jnp.ones((1, 2)))
      >>> bool(jnp.allclose(split.weights(params, {}, rest)["w"], x.T @ d_x))
      True
    """

    forward: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, list[jax.Array]]]
    backward: Callable[[PyTree, PyTree, list[jax.Array], PyTree], tuple[PyTree, list[jax.Array]]]
    weights: Callable[[PyTree, PyTree, list[jax.Array]], PyTree]


def split_layer(
    layer: Callable[[PyTree, PyTree, PyTree], PyTree], params: PyTree, x: PyTree, micro: PyTree
) -> SplitLayer:
    """Split a layer `(params, x, micro) -> y` into F, B and W, for arguments of these shapes; see `SplitLayer`.

    Gradients of matrices and stacks of them (two dimensions or more) are W's; those of vectors (gains, biases), which
    need no product, are B's and only pass through W.

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.pipeline import split_layer
      >>> layer = lambda params, x, micro: x @ params["w"]
      >>> split = split_layer(layer, {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)), {})
      >>> y, saved = split.forward({"w": jnp.ones((3, 2))}, {}, jnp.ones((4, 3)))
      >>> y.shape, [leaf.shape for leaf in saved]  # W needs the input
      ((4, 2), [(4, 3)])
    """

    def joint(params: PyTree, micro: PyTree, x: PyTree, d_y: PyTree) -> Any:
        y, pull = jax.vjp(lambda params, x: layer(params, x, micro), params, x)
        d_params, d_x = pull(d_y)
        return y, d_x, d_params

    arguments = (params, micro, x, jax.eval_shape(layer, params, x, micro))
    flat, tree = jax.tree.flatten(arguments)

    def inlined(*flat: jax.Array) -> Any:
        closed = jax.make_jaxpr(joint)(*jax.tree.unflatten(tree, flat))
        return _run_inlined(closed.jaxpr, closed.consts, flat)

    closed = jax.make_jaxpr(inlined)(*flat)
    trees = [jax.tree.structure(part) for part in (arguments[3], x, params)]
    large = [leaf.ndim > 1 for leaf in jax.tree.leaves(params)]
    return _partition(closed, [len(jax.tree.leaves(part)) for part in arguments], trees, large)


def _partition(closed: Any, counts: Sequence[int], trees: Sequence[Any], large: Sequence[bool]) -> SplitLayer:
    """Divide the equations of `joint`; counts are of the leaves of its arguments, trees those of its results."""
    jaxpr, consts = closed.jaxpr, dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    invars = list(jaxpr.invars)
    fixed, (x, d_y) = (
        invars[: counts[0] + counts[1]],
        (invars[sum(counts[:2]) : sum(counts[:3])], invars[sum(counts[:3]) :]),
    )
    y_out, d_x_out, d_p_out = _cut(jaxpr.outvars, [trees[0].num_leaves, trees[1].num_leaves, trees[2].num_leaves])
    made = {var: n for n, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    free: set[Any] = {*fixed, *consts}  # variables that every part can have without residuals
    for eqn in jaxpr.eqns:
        if not eqn.effects and all(isinstance(var, Literal) or var in free for var in eqn.invars):
            free.update(eqn.outvars)

    part: dict[int, int] = {}

    def mark(outputs: Iterable[Any], which: int) -> None:
        waiting = [var for var in outputs if isinstance(var, Var)]
        while waiting:
            n = made.get(waiting.pop())
            if n is not None and n not in part and jaxpr.eqns[n].outvars[0] not in free:
                part[n] = which
                waiting += [var for var in jaxpr.eqns[n].invars if isinstance(var, Var)]

    mark(y_out, F)
    mark([*d_x_out, *(var for var, deferred in zip(d_p_out, large, strict=True) if not deferred)], B)
    mark(d_p_out, W)
    late = set()  # results of W's products and of what follows them
    for n in sorted(n for n, which in part.items() if which == W):
        eqn = jaxpr.eqns[n]
        if _heavy(eqn) or any(isinstance(var, Var) and var in late for var in eqn.invars) or _grows(eqn):
            late.update(eqn.outvars)
        else:
            part[n] = B
    where = {var: part[n] for n, eqn in enumerate(jaxpr.eqns) if n in part for var in eqn.outvars}
    where |= dict.fromkeys(x, F) | dict.fromkeys(d_y, B)

    def needed(which: int, outputs: Sequence[Any]) -> tuple[list[int], list[Any]]:
        """The equations of a part in order, with the free ones it needs, and its inputs from earlier parts."""
        found: set[int] = set()
        seen: set[Any] = set()
        inputs: dict[Any, None] = {}
        waiting = [var for n, at in part.items() if at == which for var in jaxpr.eqns[n].outvars[:1]] + list(outputs)
        while waiting:
            var = waiting.pop()
            if not isinstance(var, Var) or var in seen:
                continue
            seen.add(var)
            if var in free or where.get(var) == which:
                if (n := made.get(var)) is not None and n not in found:
                    found.add(n)
                    waiting += jaxpr.eqns[n].invars
            else:
                inputs[var] = None
        return sorted(found), list(inputs)

    w_eqns, rest = needed(W, d_p_out)
    b_eqns, b_inputs = needed(B, [*d_x_out, *rest])
    saved = [var for var in b_inputs if where[var] == F]
    f_eqns, _ = needed(F, [*y_out, *saved])

    def run(eqns: list[int], known: dict[Any, Any], outputs: Sequence[Any]) -> list[Any]:
        return _run(jaxpr, [jaxpr.eqns[n] for n in eqns], {**consts, **known}, outputs)

    def of(params: PyTree, micro: PyTree) -> dict[Any, Any]:
        return dict(zip(fixed, jax.tree.leaves((params, micro)), strict=True))

    def forward(params: PyTree, micro: PyTree, inputs: PyTree) -> tuple[PyTree, list[jax.Array]]:
        known = of(params, micro) | dict(zip(x, jax.tree.leaves(inputs), strict=True))
        found = run(f_eqns, known, [*y_out, *saved])
        return jax.tree.unflatten(trees[0], found[: len(y_out)]), found[len(y_out) :]

    def backward(params: PyTree, micro: PyTree, residuals: list, d_out: PyTree) -> tuple[PyTree, list[jax.Array]]:
        known = of(params, micro) | dict(zip([*saved, *d_y], [*residuals, *jax.tree.leaves(d_out)], strict=True))
        found = run(b_eqns, known, [*d_x_out, *rest])
        return jax.tree.unflatten(trees[1], found[: len(d_x_out)]), found[len(d_x_out) :]

    def weights(params: PyTree, micro: PyTree, residuals: list) -> PyTree:
        known = of(params, micro) | dict(zip(rest, residuals, strict=True))
        return jax.tree.unflatten(trees[2], run(w_eqns, known, d_p_out))

    return SplitLayer(forward, backward, weights)


def _cut(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Consecutive parts of a list."""
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [list(items[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def _heavy(eqn: JaxprEqn) -> bool:
    """Whether an equation is a product, or has a body."""
    bodies = any(
        hasattr(value, "eqns") or hasattr(value, "jaxpr") for value in jax.tree.leaves(list(eqn.params.values()))
    )
    return eqn.primitive.name in PRODUCTS or bodies


def _grows(eqn: JaxprEqn) -> bool:
    """Whether the results are larger than the operands, so that these are the better residuals."""
    size = lambda variables: sum(var.aval.size * var.aval.dtype.itemsize for var in variables)  # noqa: E731
    return size(eqn.outvars) > size(eqn.invars)


def _read(var: Any, env: dict[Any, Any]) -> Any:
    return var.val if isinstance(var, Literal) else env[var]


def _run(jaxpr: Jaxpr, eqns: Sequence[JaxprEqn], known: dict[Any, Any], outputs: Sequence[Any]) -> list[Any]:
    """Run some equations of a jaxpr on the values of variables; named scopes stay (the `cause` of collectives)."""
    body = jaxpr.replace(constvars=[], invars=list(known), outvars=list(outputs), eqns=list(eqns), debug_info=None)
    return jaxpr_as_fun(ClosedJaxpr(body, []))(*known.values())


def _run_inlined(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Run a jaxpr with the bodies of calls in their place."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    for eqn in jaxpr.eqns:
        values = [_read(var, env) for var in eqn.invars]
        if eqn.primitive.name in CALLS:
            body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            inner, captured = (body.jaxpr, body.consts) if hasattr(body, "jaxpr") else (body, [])
            with jax.named_scope(str(eqn.source_info.name_stack)):
                found = _run_inlined(inner, captured, values)
        else:
            variables = {var: env[var] for var in eqn.invars if isinstance(var, Var)}
            found = _run(jaxpr, [eqn], variables, eqn.outvars)
        env.update(zip(eqn.outvars, found, strict=True))
    return [_read(var, env) for var in jaxpr.outvars]
