"""Read ``SAVE/run_owner.txt``, which names the one start of a run that may write to the directory.

It has three lines: the owner's token, its process as JSON, and a counter that rises while the owner is alive.
The token comes first for the sake of shell scripts (examples/slurm). A batch script writes only the first
line.
"""

import os
import re
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.run_files import OWNER_FILE

_SLURM_TOKEN = re.compile(r"(\d+(?:_\d+)?)\.\d+")
"""The id of a job or array element, and how often it was restarted."""


@dataclass(frozen=True)
class Owner:
    """The contents of the file."""

    token: str
    who: dict[str, Any] = field(default_factory=dict)
    """From ``describe_this_process``; empty while only a batch script has claimed the directory."""
    text: str = ""
    """The whole file. It changes as long as the owner is alive."""

    def __str__(self) -> str:
        if self.who:
            return "process {pid} on host {host}, since {since}".format_map(self.who)
        job = _SLURM_TOKEN.fullmatch(self.token)
        return f"SLURM job {job[1]}" if job else "an unidentified process"

    def lives(self) -> bool | None:
        """Whether the owner's process exists; None if it cannot be checked (on another host)."""
        here = _machine()
        if not here or self.who.get("machine") != here:
            return None
        started = _started(self.who["pid"])
        return None if started == -1 else started == self.who["started"]

    def has_slurm_job(self) -> bool:
        """Whether the owner's job is running, according to SLURM; False without SLURM."""
        job = _SLURM_TOKEN.fullmatch(self.token)
        if job is None:
            return False
        command = ["squeue", "-h", "-j", job[1], "-t", "running,completing,suspended", "-o", "%A"]
        # Options in the environment, such as a partition, could hide the job.
        env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
        try:
            ended = subprocess.run(
                command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
            )
            return bool(ended.stdout.strip())
        except (OSError, subprocess.SubprocessError):
            return False


def read_owner(path: Path) -> Owner | None:
    """The owner that the file ``path`` names; None if there is no such file.

    Raises:
        OSError: the file cannot be read at the moment.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    token, who, *_ = [*text.split("\n"), "", ""]
    found: Any = None
    with suppress(ValueError):
        found = strict_json.loads(who)
    complete = isinstance(found, dict) and found.keys() >= describe_this_process().keys()
    return Owner(token, found if complete else {}, text)


def describe_this_process() -> dict[str, Any]:
    """Describe this process, so that others can check whether it still exists."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "started": _started(os.getpid()),
        "machine": _machine(),
    }


def given_token() -> str | None:
    """The token that a batch script wrote to the file for this start, if any (examples/slurm)."""
    return os.environ.get("MESH_RUN_TOKEN") or None


def held_by_another(directory: Path, token: str | None) -> bool:
    """Whether ``directory`` may belong to a start other than the one with ``token``. Doesn't wait."""
    try:
        owner = read_owner(directory / OWNER_FILE)
    except OSError:
        return False
    return owner is not None and owner.token not in (token, given_token()) and owner.lives() is not False


def _started(pid: int) -> int | None:
    """The start time of a process in clock ticks since boot, which setting the clock doesn't change.

    None if there is no such process, -1 if the system hides the time.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # it exists, but belongs to another user
        pass
    try:
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return None if state in "ZX" else int(values[18])


def _machine() -> str:
    """Identify the boot and the namespace in which process ids are unique; "" if the system hides them.

    Two containers on one host may each have a process 7, and two hosts may have the same name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
