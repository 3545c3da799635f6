"""Constrained decoding (structured outputs): texts that a JSON schema, a regular expression or a grammar allows.

The rules are those of the package `llguidance` (extra `serve`), which gives the tokens that may come next, token by
token; the sampler draws among these (`bias` of `sharding.inference.sample.sample_tokens`).
"""

import json
from collections.abc import Collection
from typing import Any

import numpy as np

from tessera.data.text import BPETokenizer, Tokenizer

END = "<|end of a constrained text|>"  # of models without a token that ends a text


class BadGrammar(ValueError):
    """A schema, expression or grammar that cannot be used."""


class Grammars:
    """Makes the constraints of one model's texts.

    Args:
      tokenizer: of the model.
      vocab_size: of the model; what it has beyond the tokenizer's tokens is never drawn.
      ends: tokens that end a text; without one a text ends where nothing may follow, or at its limit.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Collection[int] = ()):
        try:
            import llguidance
        except ImportError as error:
            raise BadGrammar(
                "constrained decoding needs the extra `serve`: pip install 'tessera-jax[serve]'"
            ) from error
        import tokenizers

        self.vocab_size, self._matcher = vocab_size, llguidance.LLMatcher
        known = tokenizer if isinstance(tokenizer, BPETokenizer) else BPETokenizer.of_bytes()
        inner = tokenizers.Tokenizer.from_str(known.to_json())
        if not ends:
            inner.add_special_tokens([END])
        self._tokenizer = llguidance.LLTokenizer(inner.to_str(), eos_token=sorted(ends) or inner.token_to_id(END))

    def of_schema(self, schema: dict[str, Any]) -> str:
        """The grammar of JSON that a JSON schema describes."""
        try:
            return self._check(self._matcher.grammar_from_json_schema(json.dumps(schema)))
        except ValueError as error:
            raise BadGrammar(f"no usable JSON schema: {error}") from error

    def of_regex(self, regex: str) -> str:
        """The grammar of whole texts that match a regular expression (Rust's syntax, without look-around)."""
        return self._check(self._matcher.grammar_from_regex(regex))

    def of_lark(self, grammar: str) -> str:
        """A context-free grammar in Lark's syntax, with `start` as its beginning."""
        return self._check(self._matcher.grammar_from_lark(grammar))

    def constraint(self, grammar: str) -> "GrammarConstraint":
        """A new text of a grammar from above."""
        return GrammarConstraint(self._matcher(self._tokenizer, grammar, log_level=0), self)

    def _check(self, grammar: str) -> str:
        why = self._matcher.validate_grammar(grammar, self._tokenizer)
        if why and not why.startswith("WARNING"):
            raise BadGrammar(" ".join(why.split()))
        return grammar


class GrammarConstraint:
    """One text of a grammar; a `tessera.serving.requests.Constraint`."""

    def __init__(self, matcher: Any, grammars: Grammars):
        self._matcher, self._size, self._known = matcher, grammars.vocab_size, grammars._tokenizer.vocab_size

    def allowed(self) -> np.ndarray:
        """Tokens that may come next, bool [V]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise BadGrammar(self._matcher.get_error())
        found = np.unpackbits(bits, bitorder="little")[: min(self._known, self._size)].astype(bool)
        return np.pad(found, (0, self._size - len(found)))

    def accept(self, token: int) -> None:
        """Note the token that came."""
        self._matcher.consume_token(token)

    @property
    def ended(self) -> bool:
        """Whether the text is complete, and nothing may follow."""
        return self._matcher.is_stopped()
