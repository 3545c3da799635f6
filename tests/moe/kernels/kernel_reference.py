"""Float64 numpy, one group at a time: what the kernels are checked against."""

import numpy as np


def rows_by_group(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def grouped(x, w, sizes, gather=None):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    x = x if gather is None else x[np.asarray(gather)]
    out = np.zeros((x.shape[0], w.shape[2]))
    for g, rows in enumerate(rows_by_group(np.asarray(sizes))):
        out[rows] = x[rows] @ w[g]
    return out


def swiglu(x, w, sizes, gather=None):
    gate, up = (grouped(x, each, sizes, gather) for each in w)
    return gate / (1 + np.exp(-gate)) * up


def combine(x, w, sizes, tokens, weights, num_tokens, gather=None):
    out = np.zeros((num_tokens, w.shape[2]))
    np.add.at(out, np.asarray(tokens), np.asarray(weights, np.float64)[:, None] * grouped(x, w, sizes, gather))
    return out


def contract(x, dy, sizes):
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    return np.stack([x[rows].T @ dy[rows] for rows in rows_by_group(np.asarray(sizes))])


def uneven(rng, groups, rows):
    """Random sizes of sum at most `rows`, some of them zero."""
    cuts = np.sort(rng.integers(0, rows + 1, groups))
    sizes = np.diff(cuts, prepend=0)
    sizes[rng.integers(0, groups)] = 0
    return sizes.astype(np.int32)
