"""The golden values say where they come from, and are small."""

import json
import re
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
LIBRARIES = ("torch", "transformers", "peft", "mergekit", "auto_gptq", "autoawq", "compressed_tensors")


def test_every_file_states_its_source_and_command_and_all_are_small():
    sources = json.loads((GOLDEN / "sources.json").read_text())
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    stated = {path for name in sources for path in (GOLDEN.rglob(name.rstrip("/") + ("/**/*" * name.endswith("/"))))}
    made = {path for path in files if path.suffix in (".npz", ".safetensors") or path.name == "config.json"}
    assert made and made <= stated
    for name, source in sources.items():
        for one in source["source"].split(", "):
            library, version = one.split()
            released = library in LIBRARIES and version[0].isdigit()
            assert released or ("/" in library and re.fullmatch(r"[\da-f]{7}", version)), name
        assert source["command"] == "make golden"
    assert sum(path.stat().st_size for path in files) < 5_000_000
