"""Request bodies that may say anything, for the tests of serving."""

from hypothesis import strategies as st

from tessera.serving.protocol import ChatBody, CompletionBody

COMPLETION = {"model": "tiny", "prompt": "a"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
NAMES = sorted({*CompletionBody.model_fields, *ChatBody.model_fields, "include_usage", "type", "role", "content"})
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**31, 10**400, -1, 0, 1, 1e-320])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
OBJECTS = st.dictionaries(st.sampled_from(NAMES), SCALARS, max_size=3)
VALUES = SCALARS | st.lists(SCALARS | OBJECTS, max_size=3) | OBJECTS
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4)
