"""Conditional computation on the text itself: which experts each token is routed to, in color."""

import colorsys
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tessera.data.text import ByteTokenizer, TextConfig, Tokenizer, load_text
from tessera.infra.config import build
from tessera.infra.workdir import read_settings
from tessera.models.lm_loss import per_layer, router_paths
from tessera.models.transformer import Decoder
from tessera.reports.html import Section, Table, paragraphs
from tessera.reports.router import BYTE_CLASSES, byte_classes
from tessera.serving.load import Loaded, SourceConfig, load


class TokenExperts(NamedTuple):
    """Routing of a text: T tokens, L routed layers, K choices of E experts.

    Attributes:
      pieces: text of every token.
      tokens_T: their ids.
      experts_LTK: expert of every choice, best first; E for one that is not made.
      weights_LTK: its gate value; 0 for one that is not made.
      experts: E.
    """

    pieces: list[str]
    tokens_T: np.ndarray
    experts_LTK: np.ndarray
    weights_LTK: np.ndarray
    experts: int

    @property
    def used_LT(self) -> np.ndarray:
        """Choices of every token that count: fewer than K where a router lets a token have fewer experts."""
        return ((self.weights_LTK > 0) & (self.experts_LTK < self.experts)).sum(2)


def route_text(loaded: Loaded, tokens_T: np.ndarray) -> TokenExperts:
    """Run a model over tokens and keep where its routers sent them, as in evaluation.

    Raises:
      ValueError: no layer of the model is routed, or its layers are Soft MoE's, which mix all tokens.
    """
    if not router_paths(loaded.config):
        raise ValueError("no layer of this model is routed (model.mlp=routed has experts)")
    if loaded.config.moe.router.name == "soft":
        raise ValueError("router.name='soft' mixes all tokens into every expert: no token takes one")
    variables = {"params": jax.tree.map(jnp.asarray, loaded.params)}
    _, state = Decoder(loaded.config).apply(variables, jnp.asarray(tokens_T)[None], mutable=["routings"])
    routing = per_layer(state["routings"], "routing", loaded.config)
    experts, weights = np.asarray(routing.experts_NK), np.asarray(routing.weights_NK)
    pieces = _pieces(loaded.tokenizer, tokens_T)
    return TokenExperts(pieces, tokens_T, experts, weights, loaded.config.moe.router.experts)


def _pieces(tokenizer: Tokenizer, tokens_T: np.ndarray) -> list[str]:
    """Text of each token; bytes that are no letter by themselves as a dot."""
    if isinstance(tokenizer, ByteTokenizer):
        return [chr(t) if 32 <= t < 127 or t in (9, 10) else "·" for t in tokens_T.tolist()]
    return [tokenizer.decode(np.array([t])) for t in tokens_T.tolist()]


def held_out_text(run: Path, count: int, start: int = 0) -> tuple[Loaded, np.ndarray]:
    """The model of a run of `tessera train` and `count` tokens of its validation text."""
    loaded, where = load(SourceConfig(str(run))), f"{run}/config.json: data"
    splits = load_text(build(TextConfig, read_settings(run).get("data"), where))
    text = np.asarray(splits.validation.tokens if hasattr(splits.validation, "tokens") else splits.validation)
    return loaded, np.asarray(text[start : start + count], np.int32)


def color_of(expert: int, experts: int, weight: float) -> str:
    """The background of a token: a hue per expert, stronger the larger the gate value; readable on light and dark."""
    # Neighbors are far apart on the circle, so that experts 3 and 4 do not look alike.
    step = next(s for s in range(round(experts * 0.382) or 1, experts + 1) if np.gcd(s, experts) == 1)
    red, green, blue = colorsys.hls_to_rgb(expert * step % experts / experts, 0.5, 0.85)
    return f"rgb({255 * red:.0f} {255 * green:.0f} {255 * blue:.0f} / {0.15 + 0.45 * min(weight, 1.0):.2f})"


def text_html(found: TokenExperts, layer: int) -> str:
    """The text with the background of every token by the first expert of a routed layer; all choices as a hint."""
    spans = []
    for t, piece in enumerate(found.pieces):
        experts, weights = found.experts_LTK[layer, t], found.weights_LTK[layer, t]
        made = [(int(e), float(w)) for e, w in zip(experts, weights, strict=True) if w > 0 and e < found.experts]
        shown = html.escape(piece).replace("\n", "↵\n")
        if not made:
            spans.append(shown)
            continue
        hint = ", ".join(f"{e} ({w:.2f})" for e, w in made)
        color = color_of(made[0][0], found.experts, made[0][1])
        spans.append(f'<span style="background: {color}" title="experts {hint}">{shown}</span>')
    style = "white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.7 ui-monospace, monospace"
    return f'<div role="img" aria-label="text colored by expert" style="{style}">{"".join(spans)}</div>'


def experts_table(found: TokenExperts, layer: int, most: int = 6) -> Table:
    """Of every expert of a layer: its share of first choices, and the tokens that it is most often the first of."""
    first_T, body = found.experts_LTK[layer, :, 0], []
    for expert in range(found.experts):
        mine = [piece for piece, e in zip(found.pieces, first_T, strict=True) if e == expert]
        often = sorted(set(mine), key=lambda piece: (-mine.count(piece), piece))[:most]
        shown = "  ".join(f"{piece!r}" for piece in often) or "–"
        body.append([f"expert {expert}", f"{len(mine) / len(first_T):.1%}", shown])
    return Table(("", "first choice of", "most often of the tokens"), body)


def sentence(found: TokenExperts) -> str:
    """What is seen: how many experts a token takes, and the kind of character that is routed most alike by layer."""
    used = found.used_LT
    if used.min() == used.max():
        told = f"Every token takes {used.max()} of {found.experts} experts in each of {len(used)} routed layers."
    else:
        told = f"A token takes {used.min()} to {used.max()} of {found.experts} experts, {used.mean():.2f} on average."
    kinds_T = byte_classes(np.array([ord(piece[0]) if piece and ord(piece[0]) < 256 else 0 for piece in found.pieces]))
    for layer, experts_TK in enumerate(found.experts_LTK):
        best = None
        for kind, name in enumerate(BYTE_CLASSES):
            mine = experts_TK[kinds_T == kind, 0]
            if len(mine) >= 10:
                counts = np.bincount(mine, minlength=found.experts + 1)[: found.experts]
                share = counts.max() / len(mine)
                if best is None or share > best[0]:
                    best = (share, name, int(counts.argmax()), len(mine))
        if best:
            share, name, expert, count = best
            told += (
                f" Layer {layer + 1} is surest of the class “{name}”: {share:.0%} of {count} have expert {expert} as"
            )
            told += f" their first, where chance is {1 / found.experts:.0%}."
    return told


def text_section(run: Path, count: int, title: str = "Which tokens take which experts") -> Section:
    """The section of a routed run: held-out text colored by expert, a text per routed layer, and its experts.

    Raises:
      ValueError: the run's model has no routed layers.
    """
    found = route_text(*held_out_text(run, count))
    return Section(title, [paragraphs(sentence(found)), *text_parts(found)], CAPTION)


CAPTION = (
    "Held-out text. The color is the expert with the largest gate value, stronger where it is larger; pointing at a "
    "token names all its experts. A line end is ↵."
)


def text_parts(found: TokenExperts, layers: Sequence[int] = ()) -> list[Any]:
    """The colored text of every routed layer (or of some), each with its experts folded away."""
    parts: list[Any] = []
    for layer in layers or range(len(found.experts_LTK)):
        parts += [f"<h3>Routed layer {layer + 1}</h3>", text_html(found, layer)]
        parts += ["<details><summary>Experts of this layer</summary>", experts_table(found, layer), "</details>"]
    return parts
