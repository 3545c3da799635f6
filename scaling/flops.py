"""Count parameters and training FLOPs of a transformer under the published conventions.

The convention moves the exponents of a fit (much of the difference between Kaplan and Chinchilla, Porian et al. 2024),
so every count here has its convention's name and all `CONVENTIONS` can be applied to one table of shapes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

BACKWARD = 2  # a backward pass costs twice the forward pass (Kaplan et al. 2020; Hoffmann et al. 2022, appendix F)


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer.

    Attributes:
      layers, width, ff, heads, head_dim: of the blocks; ff is the hidden width of a feed-forward part (of one expert).
      vocab, length: vocabulary and training context, in tokens.
      kv_heads: key/value heads; 0: as many as `heads`.
      gated: a gated feed-forward part has three matrices, a plain one two.
      tied: input and output embedding are one table.
      relative_positions: a width x width projection of relative positions per block (Transformer-XL; the models of
        Hoffmann et al. have it). It is applied to positions, not tokens, and appendix F does not count its FLOPs.
      experts, active_experts: feed-forward parts per block, and how many of them a token uses; 1 is dense.
      shared_experts: feed-forward parts of width `ff` in blocks with experts that every token uses besides.
      latent: width of the routed experts' inputs and outputs, between two projections of the block (Nemotron 3's
        LatentMoE); 0: the width, without projections.
      dense_layers, dense_ff: of the layers, so many have one feed-forward part of width `dense_ff` instead of experts
        (the first ones in DeepSeek-V2 and V3, every second one in others); 0: none.
      window, local_layers: tokens that a query sees in so many layers, itself included (sliding-window attention).

    Example:
      >>> import scaling
      >>> shape = scaling.Shape(layers=12, width=768, ff=3072, heads=12, head_dim=64, vocab=50_257, length=1024)
      >>> f"{scaling.parameters(shape).total:,}"
      '123,532,032'
    """

    layers: int
    width: int
    ff: int
    heads: int
    head_dim: int
    vocab: int
    length: int
    kv_heads: int = 0
    gated: bool = False
    tied: bool = True
    relative_positions: bool = False
    experts: int = 1
    active_experts: int = 1
    shared_experts: int = 0
    latent: int = 0
    dense_layers: int = 0
    dense_ff: int = 0
    window: int = 0
    local_layers: int = 0

    def __post_init__(self):
        for name in ("layers", "width", "ff", "heads", "head_dim", "vocab", "length", "experts", "active_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("kv_heads", "shared_experts", "latent", "dense_layers", "dense_ff", "window", "local_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0")
        if self.local_layers > self.layers or (self.local_layers > 0) != (self.window > 0):
            raise ValueError(f"local_layers {self.local_layers} of window {self.window}: at most all layers, with one")
        if self.dense_layers > self.layers or (self.dense_layers > 0) != (self.dense_ff > 0):
            raise ValueError(
                f"dense_layers {self.dense_layers} of dense_ff {self.dense_ff}: at most the {self.layers} layers, "
                "with a width"
            )
        if self.experts == 1 and (self.shared_experts or self.latent or self.dense_layers):
            raise ValueError("shared_experts, latent and dense_layers are of models with experts above 1")
        if self.active_experts > self.experts:
            raise ValueError(f"active_experts {self.active_experts} of experts {self.experts}: at most all are active")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")


def _feed_forward(s: Shape, experts: int) -> int:
    """Weights of all layers' feed-forward parts with so many routed experts, and of the projections around them."""
    matrices = 3 if s.gated else 2
    inner = s.latent or s.width
    routed = matrices * s.ff * (inner * experts + s.width * s.shared_experts) + 2 * s.width * s.latent
    return (s.layers - s.dense_layers) * routed + s.dense_layers * matrices * s.width * s.dense_ff


def _router(s: Shape) -> int:
    return (s.layers - s.dense_layers) * s.width * s.experts if s.experts > 1 else 0


class Parameters(NamedTuple):
    """Weights of the matrices; norms and biases (under a thousandth) are not counted."""

    embedding: int
    attention: int
    feed_forward: int
    router: int
    positions: int
    output: int

    @property
    def total(self) -> int:
        """All weights."""
        return sum(self)

    @property
    def non_embedding(self) -> int:
        """Without both embedding tables."""
        return self.total - self.embedding - self.output


def parameters(shape: Shape, *, active: bool = False) -> Parameters:
    """Count the weights of the matrices; with `active`, only the experts that one token uses.

    Example:
      >>> import scaling
      >>> shape = scaling.Shape(2, 64, 128, 4, 16, vocab=256, length=64, experts=8, active_experts=2)
      >>> scaling.parameters(shape).total, scaling.parameters(shape, active=True).total
      (312320, 115712)
    """
    s = shape
    kv = s.kv_heads or s.heads
    attention = s.width * s.head_dim * (2 * s.heads + 2 * kv)
    return Parameters(
        embedding=s.vocab * s.width,
        attention=s.layers * attention,
        feed_forward=_feed_forward(s, s.active_experts if active else s.experts),
        router=_router(s),
        positions=s.layers * s.width * s.width if s.relative_positions else 0,
        output=0 if s.tied else s.vocab * s.width,
    )


def appendix_f(shape: Shape, *, embedding: bool = True, logits: bool = True) -> float:
    """Count training FLOPs per sequence as Hoffmann et al. (2022), appendix F.

    Args:
      shape: of the model; key/value heads are counted as heads (appendix F knows no others).
      embedding: count the input embedding as a matrix product, as the appendix's list does.
      logits: count the output product.

    Example:
      >>> import scaling
      >>> shape = scaling.Shape(10, 640, 2560, 10, 64, vocab=32_000, length=2_048, relative_positions=True)
      >>> flops = scaling.appendix_f(shape, embedding=False, logits=False)
      >>> round(flops / (6 * scaling.parameters(shape).total * shape.length), 2)  # table A4
      1.03
    """
    s = shape
    inner = s.head_dim * s.heads
    attention = 2 * 3 * s.length * s.width * inner  # queries, keys, values
    attention += 2 * s.length * s.length * inner  # logits
    attention += 3 * s.heads * s.length * s.length  # softmax
    attention += 2 * s.length * s.length * inner  # weighted values
    attention += 2 * s.length * inner * s.width  # output projection
    dense = 2 * s.length * _feed_forward(s, s.active_experts)
    tables = (embedding + logits) * 2 * s.length * s.vocab * s.width
    return float((1 + BACKWARD) * (s.layers * attention + dense + tables))


def exact_matmuls(shape: Shape, *, causal: bool = True) -> float:
    """Count training FLOPs per sequence of the matrix products that are computed (as for MFU), and nothing else.

    Projections with their number of key/value heads, scores and weighted values (half of them under a causal mask that
    skips masked blocks, and in local layers those of the window), active and shared experts, projections to latents and
    back, the router, and the output product; an embedding lookup is free.

    Example:
      >>> import scaling
      >>> shape = scaling.Shape(12, 768, 3072, 12, 64, vocab=50_257, length=1024)
      >>> f"{scaling.exact_matmuls(shape) / shape.length:.3g} FLOPs per token"
      '7.98e+08 FLOPs per token'
    """
    s = shape
    kv = s.kv_heads or s.heads
    pairs = s.length * (s.length + 1) / 2 if causal else float(s.length**2)
    projections = 2 * s.length * s.width * s.head_dim * (2 * s.heads + 2 * kv)
    local = _pairs(s.length, s.window) if causal else pairs  # without skipping, a window saves nothing either
    scores = 2 * 2 * ((s.layers - s.local_layers) * pairs + s.local_layers * local) * s.head_dim * s.heads
    feed_forward = 2 * s.length * (_feed_forward(s, s.active_experts) + _router(s))
    output = 2 * s.length * s.vocab * s.width
    return (1 + BACKWARD) * (s.layers * projections + scores + feed_forward + output)


def _pairs(length: int, window: int) -> float:
    """Pairs of a query and a key that it sees, itself among the `window` last ones."""
    window = min(window, length)
    return window * length - window * (window - 1) / 2


class Count(NamedTuple):
    """Parameters and training FLOPs per token under one convention."""

    params: float
    flops_per_token: float


def _six(params: int) -> Count:
    return Count(float(params), 6.0 * params)


def _kaplan(shape: Shape) -> Count:
    """N without embeddings; 6 N plus the scores' 6 layers length inner (Kaplan et al. 2020, table 1)."""
    count = parameters(shape, active=True).non_embedding
    return Count(count, 6.0 * count + 6.0 * shape.layers * shape.length * shape.heads * shape.head_dim)


CONVENTIONS: Mapping[str, Callable[[Shape], Count]] = {
    "6ND": lambda s: _six(parameters(s).total),
    "6ND, active experts": lambda s: _six(parameters(s, active=True).total),
    "6ND, no embeddings": lambda s: _six(parameters(s, active=True).non_embedding),
    "kaplan": _kaplan,
    "appendix F": lambda s: Count(parameters(s).total, appendix_f(s) / s.length),
    "appendix F, no embedding or logits": lambda s: Count(
        parameters(s).total, appendix_f(s, embedding=False, logits=False) / s.length
    ),
    "exact matmuls": lambda s: Count(parameters(s).total, exact_matmuls(s) / s.length),
}


def count(shape: Shape, convention: str) -> Count:
    """Count parameters and FLOPs per token under a named convention.

    Raises:
      ValueError: no such convention; the message lists them.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"no convention {convention!r}; there are {', '.join(map(repr, CONVENTIONS))}")
    return CONVENTIONS[convention](shape)


# Hoffmann et al. (2022), table A4: six models and the ratio of their FLOPs to 6ND. Vocabulary 32,000, context 2,048.
_SIX = {
    "73M": (10, 640, 2560, 10, 64, 1.03),
    "305M": (20, 1024, 4096, 16, 64, 1.10),
    "552M": (24, 1280, 5120, 10, 128, 1.08),
    "1.1B": (26, 1792, 7168, 14, 128, 1.04),
    "1.6B": (28, 2048, 8192, 16, 128, 1.03),
    "6.8B": (40, 3584, 14336, 28, 128, 0.99),
}
CHINCHILLA_MODELS: Mapping[str, tuple[Shape, float]] = {
    name: (Shape(*sizes[:5], vocab=32_000, length=2_048, relative_positions=True), sizes[5])
    for name, sizes in _SIX.items()
}
