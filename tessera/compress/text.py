"""Text for pruning: calibration windows, distinct from the text that is evaluated, and perplexity.

Axes: N windows, T tokens of one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from tessera.data.text import Tokenizer
from tessera.models.transformer import Decoder, TransformerConfig

TOKENS = 1024  # whose logits are computed at once
SPARE = 4  # times the windows that are needed are cut before some are drawn


@dataclass(frozen=True)
class CalibrationConfig:
    """The text that statistics are taken from.

    Attributes:
      texts: names, files or globs as `data.name` of a training has them.
      sequences: windows of it.
      length: tokens of a window.
      max_bytes: at most so much of each text, whole documents; 0 is all.
      seed: of the windows that are drawn.
    """

    texts: tuple[str, ...] = ("stdlib",)
    sequences: int = 128
    length: int = 256
    max_bytes: int = 4_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.length < 2 or self.max_bytes < 0:
            raise ValueError(
                f"sequences={self.sequences} must be at least 1, length={self.length} at least 2, "
                f"max_bytes={self.max_bytes} at least 0"
            )
        if not self.texts:
            raise ValueError("texts=(): name at least one text, such as stdlib")


def refuse_shared(calibration: Mapping[str, Sequence[str]], evaluated: Mapping[str, Sequence[str]]) -> None:
    """Refuse an evaluated document that is calibration text too.

    Args:
      calibration: documents by name of the text.
      evaluated: the same; blank documents are in any.

    Raises:
      ValueError: it names both texts and the document's beginning.
    """
    known = {document: name for name, documents in calibration.items() for document in documents if document.strip()}
    for name, documents in evaluated.items():
        for document in documents:
            if document in known:
                raise ValueError(
                    f"{name} has a document of the calibration text {known[document]}, which begins with "
                    f"{document.strip()[:40]!r}: evaluate on other text than that used for calibration"
                )


def draw_windows(
    texts: Mapping[str, Sequence[str]], tokenizer: Tokenizer, config: CalibrationConfig
) -> Int[np.ndarray, "N T"]:
    """Draw calibration windows from documents, int32 [sequences, length], without overlap.

    Documents are cut in random order until there are some times as many windows as are needed; then these are drawn.

    Raises:
      ValueError: the text is too short for so many windows.
    """
    rng = np.random.default_rng(config.seed)
    documents = [document for name in config.texts for document in texts[name]]
    windows: list[np.ndarray] = []
    for number in rng.permutation(len(documents)):
        tokens = np.asarray(tokenizer.encode(documents[number]), np.int32)
        count = len(tokens) // config.length
        if count:
            start = int(rng.integers(0, len(tokens) - count * config.length + 1))
            windows += list(tokens[start : start + count * config.length].reshape(count, config.length))
        if len(windows) >= SPARE * config.sequences:
            break
    if len(windows) < config.sequences:
        raise ValueError(
            f"calibration text too short: {', '.join(config.texts)} has {len(windows)} windows of {config.length} "
            f"tokens in its documents, and {config.sequences} are needed; give more text, or fewer or shorter sequences"
        )
    return np.stack([windows[i] for i in np.sort(rng.permutation(len(windows))[: config.sequences])])


class Measured(NamedTuple):
    """Cross-entropy of a text: tokens that were scored, and the sum of their negative log-probabilities in nats."""

    tokens: int
    nats: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(min(self.loss, 700.0))


def perplexity(
    params: PyTree,
    config: TransformerConfig,
    documents: Sequence[Sequence[int]],
    begin: int,
    length: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Measured:
    """Score documents in windows that do not overlap, as `tessera.serving.scoring.perplexity` with stride 0.

    Args:
      params: of the decoder.
      config: the decoder.
      documents: their tokens; a `begin` that the tokenizer put before one is not scored.
      begin: the token that a document follows.
      length: tokens of a window, the first of them context only.
      progress: called with the number of tokens that were scored.

    Raises:
      ValueError: no tokens.
    """
    rows = []
    for document in documents:
        text = np.asarray([begin, *(document[1:] if list(document[:1]) == [begin] else document)], np.int32)
        rows += [text[start : start + length] for start in range(0, len(text) - 1, length - 1)]
    if not rows:
        raise ValueError("no text to score: every document is empty")
    params, plain = jax.tree.map(jnp.asarray, params), replace(config, dtype="float32", remat="none")
    batch, nats, scored = max(1, TOKENS // length), 0.0, 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        tokens_NT = np.zeros((batch, length), np.int32)
        counts_N = np.zeros(batch, np.int32)
        for i, row in enumerate(part):
            tokens_NT[i, : len(row)], counts_N[i] = row, len(row) - 1
        nats += float(_nats(plain, params, tokens_NT, counts_N))
        scored += int(counts_N.sum())
        progress(int(counts_N.sum()))
    return Measured(scored, nats)


@partial(jax.jit, static_argnums=0)
def _nats(
    config: TransformerConfig, params: PyTree, tokens_NT: Int[Array, "N T"], counts_N: Int[Array, " N"]
) -> jax.Array:
    logits_NTV: Any = Decoder(config).apply({"params": params}, tokens_NT[:, :-1])
    chosen_NT = jnp.take_along_axis(logits_NTV, tokens_NT[:, 1:, None], -1)[..., 0]
    scored_NT = jnp.arange(tokens_NT.shape[1] - 1)[None] < counts_N[:, None]
    return jnp.where(scored_NT, jax.nn.logsumexp(logits_NTV, -1) - chosen_NT, 0).sum()
