"""The process of one run: `python -m scaling.sweeps.worker PARENT` carries out the pickled call on its standard input.

It ends with its parent, so that a killed sweep leaves nothing running.
"""

import os
import pickle
import sys
import threading
import time


def follow(parent: int) -> None:
    """End this process when the one with the id `parent` is no longer its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Read the call, carry it out; an exception ends the process with its traceback."""
    follow(int(sys.argv[1]))
    function, arguments = pickle.loads(sys.stdin.buffer.read())
    function(*arguments)


if __name__ == "__main__":
    main()
