"""Text that is decoded token by token is the text of all tokens at once."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tessera.data.text import BPETokenizer, ByteTokenizer
from tessera.serving.text import Delta, TextStream


def whole(tokenizer, prompt, tokens):
    """What tokens add to the text of a prompt, by decoding everything."""
    before, after = (tokenizer.decode(np.asarray([*prompt, *more], np.int32)) for more in ([], tokens))
    assert after.startswith(before)
    return after[len(before) :]


def streamed(tokenizer, tokens, stop=(), prompt=(), size=1):
    """A text fed in parts of some tokens: what was new, joined, and the stream."""
    stream, found, held = TextStream(tokenizer, stop, prompt), Delta(), [-float(i) for i in range(len(tokens))]
    for first in range(0, len(tokens), size):
        found += stream.feed(tokens[first : first + size], held[first : first + size])
    return found + stream.feed([], final=True), stream


@given(st.lists(st.integers(0, 255) | st.sampled_from(list("né €𝄞".encode())), max_size=80), st.integers(1, 5))
@example([0x80] * 100 + list("é".encode()), 1)
@example([0xF0, 0x9D, 0x84] * 50, 2)
def test_bytes_come_out_as_one_text(tokens, size):
    prompt = list("début é".encode())
    found, stream = streamed(ByteTokenizer(), tokens, prompt=prompt, size=size)
    assert found.text == whole(ByteTokenizer(), prompt, tokens) == "".join(found.tokens)
    assert found.logprobs == tuple(-float(i) for i in range(len(tokens))) and stream.count == len(tokens)
    assert all(found.text[at : at + len(one)] == one for at, one in zip(found.offsets, found.tokens, strict=True))


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=3), min_size=1, max_size=3))
def test_everything_ends_at_the_stop_string_that_is_first_complete(text, stop):
    found, stream = streamed(ByteTokenizer(), list(text.encode()), stop, size=3)
    first = next((n for n in range(len(text)) if any(text[: n + 1].endswith(word) for word in stop)), None)
    end = len(text)
    if first is not None:
        end = first + 1 - max(len(word) for word in stop if text[: first + 1].endswith(word))
    assert found.text == text[:end] == "".join(found.tokens) and stream.stopped == (end < len(text))
    assert len(found.tokens) == len(found.logprobs) == stream.count == len(text[:end].encode())


def test_a_stream_holds_back_half_characters_and_what_may_be_a_stop_string():
    stream = TextStream(ByteTokenizer(), ["stop"])
    assert [stream.feed([byte]).text for byte in "né stop".encode()] == ["n", "", "é", " ", "", "", "", ""]
    assert stream.stopped and stream.count == 4
    behind = TextStream(ByteTokenizer(), offset=5)  # five letters were given before
    deltas = [behind.feed([byte], logprobs=[-1.0]) for byte in "né!".encode()]
    assert [place for delta in deltas for place in delta.offsets] == [5, 6, 6, 7]
    other = TextStream(ByteTokenizer(), ["stop"])
    assert other.feed(list(b"a sto")).text + other.feed([], final=True).text == "a sto"


@pytest.fixture(scope="module")
def llama():
    """A tokenizer that writes spaces, falls back to bytes and decodes as Llama 2's does."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "▁▁", "é"]
    model = tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    inner = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.add_special_tokens(["</s>"])
    return BPETokenizer(inner)


@given(st.data())
def test_a_tokenizer_that_drops_the_first_space_drops_none_here(llama, data):
    letters = st.sampled_from([[1], [258], [259], [260], [261], [262], [263], [264], [2 + 0xC3, 2 + 0xA9]])
    prompt = [261, *sum(data.draw(st.lists(letters, max_size=4)), []), 259]
    tokens = sum(data.draw(st.lists(letters, max_size=30)), [])
    found, _ = streamed(llama, tokens, prompt=prompt)
    assert found.text == whole(llama, prompt, tokens)


def test_a_space_in_front_of_the_text_stays(llama):
    assert streamed(llama, [261], prompt=[260])[0].text == " a" and llama.decode(np.asarray([261])) == "a"


@pytest.mark.parametrize("kind", ["letters", "no characters"])
def test_decoding_is_linear_in_the_text(kind):
    class Counting(ByteTokenizer):
        read = 0

        def decode(self, tokens):
            self.read += len(tokens)
            return super().decode(tokens)

    tokenizer = Counting()
    streamed(tokenizer, [97 if kind == "letters" else 0x80] * 1000, ["aab"])
    assert tokenizer.read < 1000 * 200
