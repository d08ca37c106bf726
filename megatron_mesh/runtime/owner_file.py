"""``SAVE/run_owner.txt``: which start of a run may write to its directory.

Three lines: the owner's token, who that is as JSON, and a counter that rises while the owner lives. The token
comes first for shell scripts (examples/slurm). A batch script writes the first line alone.
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
"""A job, or an element of an array, and how often it was restarted."""


@dataclass(frozen=True)
class Owner:
    """What the file says."""

    token: str
    who: dict[str, Any] = field(default_factory=dict)
    """``describe_this_process``; empty if only a batch script has claimed the directory so far."""
    text: str = ""
    """The whole file. It changes while the owner lives."""

    def __str__(self) -> str:
        if self.who:
            return "process {pid} on host {host}, since {since}".format_map(self.who)
        job = _SLURM_TOKEN.fullmatch(self.token)
        return f"SLURM job {job[1]}" if job else "an unidentified process"

    def lives(self) -> bool | None:
        """Whether the owner's process exists; None if that cannot be known from here."""
        here = _machine()
        if not here or self.who.get("machine") != here:
            return None
        started = _started(self.who["pid"])
        return None if started == -1 else started == self.who["started"]

    def has_slurm_job(self) -> bool:
        """Whether SLURM says that the owner's job runs now. False if there is no SLURM to ask."""
        job = _SLURM_TOKEN.fullmatch(self.token)
        if job is None:
            return False
        command = ["squeue", "-h", "-j", job[1], "-t", "running,completing,suspended", "-o", "%A"]
        # Options in the environment, such as a partition, would hide the job.
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
        OSError: the file cannot be read just now.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    token, who, *_ = [*text.split("\n"), "", ""]
    said: Any = None
    with suppress(ValueError):
        said = strict_json.loads(who)
    complete = isinstance(said, dict) and said.keys() >= describe_this_process().keys()
    return Owner(token, said if complete else {}, text)


def describe_this_process() -> dict[str, Any]:
    """Which process this is, so that others can tell whether it still exists."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "started": _started(os.getpid()),
        "machine": _machine(),
    }


def given_token() -> str | None:
    """The token that a batch script has written to the file for this start, if any (examples/slurm)."""
    return os.environ.get("MESH_RUN_TOKEN") or None


def held_by_another(directory: Path, token: str | None) -> bool:
    """Whether ``directory`` may belong to another start than the one with ``token``. Does not wait."""
    try:
        owner = read_owner(directory / OWNER_FILE)
    except OSError:
        return False
    return owner is not None and owner.token not in (token, given_token()) and owner.lives() is not False


def _started(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot: setting the clock doesn't change that.

    None if there is no such process, -1 if the system hides it.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # it exists, and belongs to somebody else
        pass
    try:
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return None if state in "ZX" else int(values[18])


def _machine() -> str:
    """Names the space in which a process id means this process; "" if the system doesn't tell.

    Containers on one host may each have a process 7, and two hosts may have the same name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
