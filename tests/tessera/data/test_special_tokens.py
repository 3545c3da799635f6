"""Tokens that files beside tokenizer.json name: ids and text are AutoTokenizer's of transformers 5.24.0."""

import json
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

import tokenizers

from tessera.data.text import BPETokenizer, NoSuchToken, load_tokenizer

BYTELEVEL = Path(__file__).parents[2] / "golden" / "tokenizers" / "bytelevel.json"  # of 400 tokens
TEXT = "it <|x|> is"
X = {"content": "<|x|>"}
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
LISTED = X | FLAGS
NAMED = FLAGS | {"content": "is", "__type": "AddedToken"}
CONFIG, MAP, OLDEST = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
PIECES = [28, 92, 88, 92, 30]
CASES = {  # plain tokens of tokenizer.json, files beside it, ids after "it", text without special tokens
    "none": ([], {}, [221, *PIECES, 385], TEXT),
    "listed": ([], {CONFIG: {"added_tokens_decoder": {"400": LISTED}}}, [221, 400, 385], "it  is"),
    "listed, plain": (
        [],
        {CONFIG: {"added_tokens_decoder": {"400": LISTED | {"special": False}}}},
        [221, 400, 385],
        TEXT,
    ),
    "listed as plain and named": (
        [],
        {CONFIG: {"added_tokens_decoder": {"400": LISTED | {"special": False}}, "eos_token": "<|x|>"}},
        [221, 400, 385],
        "it  is",
    ),
    "listed with other flags": (
        [X],
        {CONFIG: {"added_tokens_decoder": {"400": LISTED | {"lstrip": True}}}},
        [400, 385],
        "it is",
    ),
    "listed under other numbers": (
        [],
        {CONFIG: {"added_tokens_decoder": {"777": LISTED, "500": LISTED | {"content": "is"}}}},
        [221, 400, 221, 285],
        "it  ",
    ),
    "additional": ([], {CONFIG: {"additional_special_tokens": ["<|x|>"]}}, [221, 400, 385], "it  is"),
    "extra": ([], {CONFIG: {"extra_special_tokens": ["is", "<|x|>"]}}, [221, 400, 221, 285], "it  "),
    "extra by name": ([], {CONFIG: {"extra_special_tokens": {"image": "<|x|>"}}}, [221, 400, 385], "it  is"),
    "named": ([], {CONFIG: {"pad_token": "<|x|>", "bos_token": NAMED}}, [221, 400, 221, 285], "it  "),
    "a name of the model's": ([], {CONFIG: {"image_token": "<|x|>"}}, [221, 400, 385], "it  is"),
    "older": ([], {MAP: {"eos_token": "is", "additional_special_tokens": ["<|x|>"]}}, [221, 400, 221, 285], "it  "),
    "newer before older": (
        [],
        {CONFIG: {"added_tokens_decoder": {}}, MAP: {"eos_token": "<|x|>"}},
        [221, *PIECES, 385],
        TEXT,
    ),
    "oldest": ([], {OLDEST: {"<|x|>": 400}}, [221, 400, 385], TEXT),
    "oldest, named": (
        [],
        {OLDEST: {"<|x|>": 401, "is": 400}, CONFIG: {"eos_token": "<|x|>"}},
        [221, 400, 221, 285],
        "it  is",
    ),
    "plain": ([X], {}, [221, 400, 385], TEXT),
    "plain and named": ([X], {CONFIG: {"eos_token": "<|x|>"}}, [221, 400, 385], "it  is"),
    "a word that is named": ([], {CONFIG: {"eos_token": "it"}}, [221, *PIECES, 385], " <|x|> is"),
}


def write(directory, plain, files):
    inner = tokenizers.Tokenizer.from_file(str(BYTELEVEL))
    inner.add_tokens([tokenizers.AddedToken(**one) for one in plain])
    inner.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_all_the_tokenizers_files(case, tmp_path):
    plain, files, ids, text = CASES[case]
    write(tmp_path, plain, files)
    for _ in range(2):
        known = load_tokenizer(tmp_path)
        assert known.encode(TEXT).tolist() == [0, 278, *ids]  # 0: <|endoftext|>, put around every text
        assert known.decode(known.encode(TEXT)) == text
        (tmp_path / "kept").mkdir(exist_ok=True)
        tmp_path = tmp_path / "kept"
        known.save(tmp_path / "tokenizer.json")  # the copy needs no files beside it


@pytest.mark.parametrize(
    "name, content",
    [
        (CONFIG, {"added_tokens_decoder": {"x": LISTED}}),
        (CONFIG, {"added_tokens_decoder": {"400": "<|x|>", "y": 1}}),
        (CONFIG, {"added_tokens_decoder": ["<|x|>"]}),
        (CONFIG, {"extra_special_tokens": [3]}),
        (MAP, {"eos_token": {"content": "<|x|>", "lstrip": "no"}}),
        (OLDEST, {"<|x|>": "a", "b": 1}),
    ],
)
def test_a_damaged_list_of_tokens_is_named(name, content, tmp_path):
    write(tmp_path, [], {name: content})
    with pytest.raises(ValueError, match=f"{name}.* names no tokens"):
        load_tokenizer(tmp_path)


def test_a_token_that_the_model_has_not_is_refused_by_name_where_a_text_has_it(tmp_path):
    write(tmp_path, [], {CONFIG: {"pad_token": "<|x|>"}})
    known = BPETokenizer.load(tmp_path / "tokenizer.json")
    assert (known.own_size, known.vocab_size) == (400, 401)
    known.limit = 400
    assert known.encode("it is").tolist() == [0, 278, 385]
    with pytest.raises(NoSuchToken, match=r"'<\|x\|>', which is token 400 .* tokens 0\.\.399"):
        known.encode(TEXT)
