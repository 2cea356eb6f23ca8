"""A throw-away SLURM of two nodes on this machine, made of Debian's packages.

Everything lies in one directory; /etc is not touched and no service manager is needed. Debian's
slurmd can pose as several nodes of one host.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol")
N_NODE = 2

# cred_expire: a requeued job waits until its old credential has expired, by default two minutes;
# SLURM accepts no less than 5 seconds.
# FirstJobId: Lightning makes the port at which ranks meet of the job's number.
# GraceTime: a preempted job gets TERM and so many seconds.
CONFIGURATION = """\
ClusterName=drill
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=30
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def block() -> int:
    """A number of this process of pytest-xdist, so that clusters side by side do not collide."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8


def free_ports() -> Iterator[int]:
    """TCP ports that nobody listens at, each once, and that no outgoing connection is given."""
    first = 25_000 + 900 * block()
    for port in random.SystemRandom().sample(range(first, first + 900), 900):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


def wait_until(
    condition: Callable[[], object], what: str, seconds: float = 180,
    details: Callable[[], str] = str,
) -> object:  # fmt: skip
    """The first true value of ``condition``; ``details`` are told of when it does not come."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}\n{details()}")


class Cluster:
    """slurmctld, munged and two slurmd."""

    def __init__(self, directory: Path):
        """``directory``: for all state; short, since a socket lies in it."""
        self.directory = directory
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}

    def start(self) -> None:
        """Returns when both nodes are idle."""
        directory = self.directory
        (directory / "state").mkdir(parents=True)
        directory.chmod(0o755)
        key = directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host = socket.gethostname().split(".")[0]
        lines, ports = [], free_ports()
        for node in range(1, N_NODE + 1):
            (directory / f"spool-node{node}").mkdir()
            lines.append(
                f"NodeName=node{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={next(ports)} "
                "CPUs=4 RealMemory=4000 State=UNKNOWN"
            )
        (directory / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host,
                control_port=next(ports),
                directory=directory,
                nodes="\n".join(lines),
                first_job=1000 * (block() + 1) + random.SystemRandom().randrange(900),
            )
        )
        self.run(
            "munged", "--force", f"--key-file={key}", f"--socket={directory}/munge.socket",
            f"--pid-file={directory}/munged.pid", f"--log-file={directory}/munged.log",
            f"--seed-file={directory}/munged.seed",
        )  # fmt: skip
        self.run("slurmctld", "-c")
        for node in range(1, N_NODE + 1):
            self.start_node(node)
        self.wait_idle()

    def start_node(self, node: int) -> None:
        """Starts the slurmd of node 1 or 2."""
        self.run("slurmd", "-N", f"node{node}", "-c")

    def wait_idle(self) -> None:
        """Until both nodes have nothing to do."""
        idle = ("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N")
        wait_until(lambda: len(self.run(*idle).split()) == N_NODE, "idle nodes", 60)

    def stop(self) -> None:
        """Ends every job and daemon."""
        subprocess.run(["scancel", "-u", "root"], env=self.environment, check=False)
        deadline = time.monotonic() + 40
        while self.run("squeue", "-h").strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        self._kill(*self.directory.glob("*.pid"))

    def kill_node(self, node: int) -> None:
        """kill -9 of a node's slurmd."""
        self._kill(self.directory / f"slurmd-node{node}.pid", number=signal.SIGKILL)

    def _kill(self, *files: Path, number: int = signal.SIGTERM) -> None:
        """Ends daemons, all at once; those that take longer than 10 seconds are killed."""
        daemons = []
        for file in files:
            with contextlib.suppress(psutil.NoSuchProcess, ValueError, FileNotFoundError):
                daemons.append(psutil.Process(int(file.read_text())))
                daemons[-1].send_signal(number)
        for daemon in psutil.wait_procs(daemons, timeout=10)[1]:
            daemon.kill()

    def run(self, *command: str) -> str:
        """The output of a command of SLURM's."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout

    def logs(self) -> str:
        """The end of what each daemon has logged."""
        files = sorted(self.directory.glob("slurm*.log"))
        return "".join(f"--- {file.name}\n{file.read_text()[-2000:]}" for file in files)

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, ..."""
        fields = self.run("scontrol", "show", "job", job).split()
        return next(f.removeprefix("JobState=") for f in fields if f.startswith("JobState="))


def missing_programs() -> list[str]:
    """What a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None]
