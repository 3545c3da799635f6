"""Commands of `tessera` in this process: what is said and written is theirs; only dying takes a process of its own."""

import contextlib
import io

import pytest

from tessera.cli import main as cli


def run_here(name, *argv):
    """Exit status of a command and what it wrote to both streams."""
    output, linger = io.StringIO(), cli.LINGER
    cli.LINGER = 1e6  # a command that failed does not end the process of the tests, as it would end its own
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), pytest.raises(SystemExit) as stop:
            cli.run(name, argv)
    finally:
        cli.LINGER = linger
    return stop.value.code, output.getvalue()
