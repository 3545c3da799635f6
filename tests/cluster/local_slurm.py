"""A SLURM of one machine, without accounting: `python tests/cluster/local_slurm.py start DIR`, and `stop DIR`.

It needs Debian's packages `slurm-wlm` and `munge` and the rights of root. Every file of it lies in DIR; what talks to
it needs `SLURM_CONF=DIR/slurm.conf`.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONF = """\
ClusterName=tessera
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=30
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(RuntimeError):
    """SLURM cannot run here."""


def start(directory: Path, cpus: int = 4) -> dict[str, str]:
    """Start munged, slurmctld and slurmd, wait until the node is idle, and return the variables its users need."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        raise Unavailable(f"SLURM is not here ({', '.join(missing)}): apt-get install slurm-wlm munge")
    if os.getuid() != 0:
        raise Unavailable("slurmd needs the rights of root")
    directory = directory.absolute()
    munge = directory / "munge"
    for folder in (munge, directory / "state", directory / "spool"):
        folder.mkdir(parents=True)
    munge.chmod(0o755)
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o400)
    ports = [socket.socket() for _ in range(2)]
    for port in ports:
        port.bind(("127.0.0.1", 0))
    controller, node = (port.getsockname()[1] for port in ports)
    for port in ports:
        port.close()
    host = socket.gethostname().split(".")[0]
    # The machine's own number of processors may be smaller than what the tests share out.
    text = CONF.format(host=host, directory=directory, controller=controller, node=node, cpus=cpus)
    (directory / "slurm.conf").write_text(text + "SlurmdParameters=config_overrides\n")
    variables = {"SLURM_CONF": str(directory / "slurm.conf")}
    environment = os.environ | variables
    files = [f"--{name}={munge / value}" for name, value in (("key-file", "key"), ("socket", "socket"))]
    more = [
        f"--{name}={munge / value}" for name, value in (("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))
    ]
    # munged distrusts a directory that others may write to, as /tmp.
    daemons = [["munged", "--force", *files, *more]]
    daemons += [[*program, "-f", environment["SLURM_CONF"]] for program in (("slurmctld",), ("slurmd", "-N", host))]
    try:
        for daemon in daemons:
            subprocess.run(daemon, check=True, timeout=30, env=environment, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 60
        while "idle" not in (state := _output(["sinfo", "--noheader", "--format=%T"], environment)):
            if time.monotonic() > limit:
                raise TimeoutError(f"the node is {state.strip() or 'unknown'} after a minute")
            time.sleep(0.5)
    except (OSError, subprocess.SubprocessError) as error:
        stop(directory)
        raise Unavailable(f"SLURM does not start here ({error}); its logs are in {directory}") from error
    return variables


def stop(directory: Path) -> None:
    """Cancel what runs and end the three daemons."""
    directory = directory.absolute()
    environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}
    if (directory / "slurmctld.pid").exists():
        with contextlib.suppress(subprocess.TimeoutExpired):  # it does not answer; it is ended all the same
            subprocess.run(["scancel", "--user=root"], env=environment, timeout=30, capture_output=True)
    for name in ("slurmd.pid", "slurmctld.pid", "munge/pid"):
        try:
            process = int((directory / name).read_text())
            os.kill(process, signal.SIGTERM)
        except (FileNotFoundError, ProcessLookupError, ValueError):
            continue
        limit = time.monotonic() + 30
        while Path(f"/proc/{process}").exists():
            if time.monotonic() > limit:
                os.kill(process, signal.SIGKILL)
                break
            time.sleep(0.1)


def _output(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30).stdout


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop"):
        sys.exit(__doc__)
    try:
        if sys.argv[1] == "stop":
            stop(Path(sys.argv[2]))
        else:
            print("\n".join(f"export {name}={value}" for name, value in start(Path(sys.argv[2])).items()))
    except Unavailable as reason:
        sys.exit(str(reason))
