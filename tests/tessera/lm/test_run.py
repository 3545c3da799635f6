"""The language-model run: its table of results."""

import io

import numpy as np
from rich.console import Console

from tessera.lm.run import results_table


def test_results_table():
    stream = io.StringIO()
    Console(file=stream, width=80).print(results_table("run", {"test": {"loss": np.log(2), "accuracy": 0.5}}))
    for text in ("run", "test", "0.6931", "1.0000", "0.5000"):
        assert text in stream.getvalue()
