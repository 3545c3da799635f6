"""Tokens that the files beside a tokenizer.json name, as transformers reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.infra.logger import read_object

# Names that a chat template knows special tokens by.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SETTINGS, OLDER, OLDEST = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NEWER = "added_tokens_decoder"  # where the settings have it, the older files are not read


def read_settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, and over it special_tokens_map.json if it is read; empty without either."""
    found = _read(directory / SETTINGS)
    return found if NEWER in found else found | _read(directory / OLDER)


def text_of(token: Any) -> str | None:
    """A token's text in these files, where it is a string or an object; None if it is neither."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def add_named(inner: Any, directory: Path) -> None:
    """Add the tokens that a directory's files name: those not in the vocabulary get the numbers that follow it.

    Without this a text's special tokens are split into pieces, or printed where tokenizer.json has them as plain ones.

    Args:
      inner: `tokenizers.Tokenizer` of the directory's tokenizer.json.
      directory: where it is.

    Raises:
      ValueError: a file is damaged.
    """
    settings = read_settings(directory)
    own = inner.get_added_tokens_decoder()
    try:
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        further = list(extra.values()) if isinstance(extra, dict) else list(extra)
        keys = [*NAMES, *(key for key in settings if key.endswith("_token") and key not in NAMES)]  # image_token ...
        named = [settings[key] for key in keys if text_of(settings.get(key)) is not None]
        if NEWER in settings:
            numbered = {int(number): _token(one) for number, one in settings[NEWER].items()}
        else:
            special = {text_of(one) for one in named + further}
            numbered = {
                number: _token({"content": text, "special": text in special, "normalized": text not in special})
                for text, number in _read(directory / OLDEST).items()
            } | own
        added = [token for _, token in sorted(numbered.items())]
        known = {token.content for token in [*own.values(), *added]}
        added += [_token(one) for one in named + further if text_of(one) not in known]
        texts = {text_of(one) for one in named}
        for token in added:  # plain in tokenizer.json, and yet the end of a text
            token.special = token.special or token.content in texts
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{directory}: {SETTINGS}, {OLDER} or {OLDEST} names no tokens, which are strings or objects with content "
            f"and flags, by whole numbers in {NEWER}: {error}"
        ) from error
    inner.add_tokens(added)


def _token(value: Any) -> Any:
    import tokenizers

    options: Mapping[str, Any] = value if isinstance(value, dict) else {"content": value}
    return tokenizers.AddedToken(**{"special": True, **{key: options[key] for key in options if key != "__type"}})


def _read(file: Path) -> dict[str, Any]:
    return read_object(file) if file.exists() else {}
