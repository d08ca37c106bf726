"""A real SLURM cluster of two nodes on this host, with its own daemons, ports and folder, for the tests."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

NODES = ("node1", "node2")
_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")

_SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/run/munge.socket,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
MinJobAge=600
FirstJobId={first_job}
KillWait={kill_wait}
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node1 NodeHostname=localhost Port={node1} CPUs=16 RealMemory=12000 Gres=gpu:8
NodeName=node2 NodeHostname=localhost Port={node2} CPUs=16 RealMemory=12000 Gres=gpu:8
PartitionName=low Nodes=node[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=nograce Nodes=node[1-2] PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=node[1-2] PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why such a cluster cannot be started here, or ""."""
    if os.geteuid() != 0:
        return "starting a SLURM cluster needs root"
    absent = [name for name in _DAEMONS if _program(name) is None]
    return f"SLURM is not installed ({', '.join(absent)} missing); run make slurm-env" if absent else ""


class Cluster:
    """A cluster. ``stop`` ends its daemons and every job's processes.

    Args:
        kill_wait: seconds between a job's SIGTERM and its SIGKILL.
    """

    def __init__(self, kill_wait: int = 30):
        # Not in pytest's folder, because the path of a socket is limited to 107 characters.
        self.base = Path(tempfile.mkdtemp(prefix="mesh-slurm-"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.base / "etc/slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._write_files(kill_wait)
        # Ends everything even if the tests are killed: its pipe closes with this process.
        self._reaper = subprocess.Popen(
            [sys.executable, __file__, str(self.base)], stdin=subprocess.PIPE, start_new_session=True
        )

    def _write_files(self, kill_wait: int) -> None:
        self.base.chmod(0o755)  # munged refuses a folder that its clients cannot enter
        for name in ("etc", "run", "log", "state", "spool/node1", "spool/node2", "dev"):
            (self.base / name).mkdir(parents=True)
        key = self.base / "etc/munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        for index in range(8):
            os.mknod(self.base / f"dev/nvidia{index}", 0o020666, os.makedev(1, 3))
        gpus = f"NodeName=node[1-2] Name=gpu File={self.base}/dev/nvidia[0-7]"
        (self.base / "etc/gres.conf").write_text(f"AutoDetect=off\n{gpus}\n")
        ports = dict(zip(("controller", *NODES), _free_ports(3), strict=True))
        # Ports of jobs depend on their numbers, and another cluster may run on this host.
        first_job = secrets.randbelow(100000) + 1
        text = _SLURM_CONF.format(base=self.base, kill_wait=kill_wait, first_job=first_job, **ports)
        (self.base / "etc/slurm.conf").write_text(text)

    def start(self) -> None:
        """Start the daemons, and wait until both nodes are idle."""
        run = self.base / "run"
        self._start(
            "munged",
            "--foreground",
            f"--key-file={self.base}/etc/munge.key",
            f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--log-file={self.base}/log/munged.log",
            f"--seed-file={run}/munged.seed",
        )
        wait_until(lambda: (run / "munge.socket").exists(), 10, "munged")
        self._start("slurmctld", "-D", "-c")
        wait_until(lambda: "UP" in self.call("scontrol", "ping"), 30, "slurmctld")  # nodes retry rarely
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """SIGKILL the daemon of a node; the processes that it started survive."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait(10)

    def wait_for_nodes(self) -> None:
        """Wait until both nodes are idle."""
        idle = lambda: self.call("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle", "idle"]  # noqa: E731
        wait_until(idle, 30, f"idle nodes; see {self.base}/log")

    def call(self, *command: str) -> str:
        """The output of a SLURM command, or "" if it fails, since the controller may be starting."""
        ended = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        return ended.stdout if ended.returncode == 0 else ""

    def job(self, job: int | str) -> dict[str, str]:
        """The fields of a job, named as in ``scontrol show job``."""
        words = self.call("scontrol", "-o", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def clear(self) -> None:
        """End all jobs, and wait until the nodes are idle again."""
        for job in self.call("squeue", "-h", "-o", "%A").split():
            self.call("scancel", "--full", "--signal=KILL", job)
            self.call("scancel", job)
        for node in NODES:
            if node not in self._daemons:
                self.start_node(node)
        _kill_all(self.base, sparing=("munged", "slurmctld", "slurmd"))
        self.wait_for_nodes()

    def stop(self) -> None:
        """End the daemons and all processes that they have started, and remove the folder."""
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait(30)
        for daemon in self._daemons.values():
            daemon.wait(10)

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        path = _program(program)
        assert path is not None, missing()
        with (self.base / f"log/{name or program}.out").open("ab") as output:
            self._daemons[name or program] = subprocess.Popen(
                [path, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def wait_until(true: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until ``true()``; after ``seconds`` raise a TimeoutError that names ``what``."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


def _free_ports(count: int) -> list[int]:
    """Free ports below the range of outgoing connections, which might otherwise take one in the meantime."""
    free: list[int] = []
    while len(free) < count:
        port = secrets.randbelow(10000) + 10000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            free.append(port)
    return free


def _kill_all(base: Path, sparing: tuple[str, ...] = ()) -> None:
    """SIGKILL every process of the cluster in ``base``, recognized by SLURM_CONF in its environment."""
    conf = str(base / "etc/slurm.conf")
    for _ in range(3):  # a process may start another one in the meantime
        for process in psutil.process_iter(["name"]):
            try:
                ours = process.environ().get("SLURM_CONF") == conf
                if ours and process.pid != os.getpid() and process.info["name"] not in sparing:
                    process.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue  # it has ended, or may not be inspected
        time.sleep(0.1)


if __name__ == "__main__":  # the reaper
    sys.stdin.read()
    _kill_all(Path(sys.argv[1]))
    shutil.rmtree(sys.argv[1], ignore_errors=True)
