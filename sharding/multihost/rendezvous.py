"""A roll call of processes before JAX joins them: JAX ends a process that waits in vain without saying who is missing.

The first process listens, the others say their numbers, and all of them hear if everybody is there. Only then does
`jax.distributed` start on the same port.
"""

import contextlib
import socket
import time
from collections.abc import Iterator

ALL = b"all\n"
LONGEST = 4096  # bytes of a line


class Missing(TimeoutError):
    """Not everybody came; the message says who, as far as this process can know."""


def roll_call(address: str, processes: int, index: int, seconds: float) -> None:
    """Wait until all processes are there.

    Args:
      address: host:port of the first process.
      processes: their number.
      index: of this process.
      seconds: how long to wait.

    Raises:
      Missing: some did not come in time, or nobody answers at the address.
      OSError: the first process cannot listen on the port.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    if index == 0:
        _lead(int(port), processes, deadline)
    else:
        _follow(host.strip("[]"), int(port), address, index, deadline)


def _left(deadline: float, least: float = 0.05) -> float:
    return max(least, deadline - time.monotonic())


def _lead(port: int, processes: int, deadline: float) -> None:
    present: dict[int, socket.socket] = {}
    with _listening(port) as server, contextlib.ExitStack() as open_sockets:
        while len(present) < processes - 1:
            server.settimeout(_left(deadline))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                break
            open_sockets.enter_context(peer)
            peer.settimeout(_left(deadline, 1.0))
            with contextlib.suppress(OSError, ValueError):  # a stranger, or one that is gone again
                number = int(_line(peer))
                if 0 < number < processes:
                    present[number] = peer
        missing = [number for number in range(1, processes) if number not in present]
        words = f"{_numbers(missing)} of {processes} did not come"
        for peer in present.values():
            with contextlib.suppress(OSError):
                peer.sendall(words.encode() + b"\n" if missing else ALL)
        if missing:
            raise Missing(words)


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    try:
        yield server
    finally:
        server.close()


def _follow(host: str, port: int, address: str, index: int, deadline: float) -> None:
    failure = "it does not answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=_left(deadline)) as leader:
                leader.sendall(f"{index}\n".encode())
                # The first process waits as long as this one, and may have begun later.
                leader.settimeout(_left(deadline) + (deadline - time.monotonic()) + 10)
                answer = _line(leader)
        except OSError as error:
            failure = str(error)
            time.sleep(min(0.2, _left(deadline)))
            continue
        if answer == ALL.decode().strip():
            return
        if answer:
            raise Missing(answer)
    raise Missing(f"process 0 is not at {address} ({failure})")


def _line(peer: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n") and len(data) < LONGEST:
        block = peer.recv(LONGEST)
        if not block:
            break
        data += block
    return data.decode(errors="replace").strip()


def _numbers(missing: list[int]) -> str:
    shown = ", ".join(str(number) for number in missing[:8]) + (", ..." if len(missing) > 8 else "")
    return f"process {shown}" if len(missing) == 1 else f"processes {shown} ({len(missing)})"
