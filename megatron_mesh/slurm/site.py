"""Reads a site file, a filled-in copy of ``site.sh``, with bash, as jobs do."""

import argparse
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.runtime.run_files import SITE_FILE

TEMPLATE = Path(__file__).with_name(SITE_FILE)
"""The site file to copy and fill in."""
ENVIRONMENTS = ("venv", "pyxis", "apptainer")
LONGEST_WARNING = 65535
"""Seconds: the maximum that ``sbatch --signal`` accepts."""

_NAMES = (
    "GPUS_PER_NODE",
    "CPUS_PER_TASK",
    "TIME_LIMIT",
    "SAVE_SECONDS",
    "ENVIRONMENT",
    "PYTHON",
    "CONTAINER",
)
_READ_SECONDS = 60.0
_PRINT_ALL = '. "$1" >&2 && printf "%s\\0" {} "${{SBATCH_OPTIONS[@]}}"'


@dataclass(frozen=True)
class Site:
    """The values of a site file."""

    path: Path
    gpus_per_node: int
    cpus_per_task: int
    time_limit: str
    environment: str
    """Where Python comes from; one of ``ENVIRONMENTS``."""
    save_seconds: int
    """The longest time that saving a checkpoint may take."""
    sbatch_options: tuple[str, ...]

    @property
    def warning_seconds(self) -> int:
        """A job is asked to stop this many seconds before its time limit."""
        return 2 * self.save_seconds + 60

    @property
    def partition(self) -> str | None:
        """The partition in ``sbatch_options``; None means the cluster's default."""
        parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
        parser.add_argument("-p", "--partition")
        words = [word for option in self.sbatch_options for word in option.split()]
        try:
            return parser.parse_known_args(words)[0].partition
        except argparse.ArgumentError:  # the value is missing; sbatch will report that
            return None


def read_site(path: Path) -> Site:
    """Read a site file.

    Raises:
        UserError: the file cannot be read, or a value is missing or wrong.
    """
    if not path.is_file():
        raise UserError(f"--site {path} is not a file; copy {TEMPLATE} and fill it in")
    wanted = " ".join(f'"${{{name}-}}"' for name in _NAMES)
    command = ["bash", "-c", _PRINT_ALL.format(wanted), "bash", str(path.resolve())]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_READ_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"--site {path}: bash did not finish within {_READ_SECONDS:g} s; move slow commands into prepare"
        ) from None
    if ended.returncode:
        raise UserError(f"--site {path}: bash fails to read it: {ended.stderr.strip() or 'no error message'}")
    values = ended.stdout.split("\0")[:-1]
    found, options = dict(zip(_NAMES, values, strict=False)), tuple(filter(None, values[len(_NAMES) :]))
    if found["ENVIRONMENT"] not in ENVIRONMENTS:
        raise UserError(
            f"--site {path}: ENVIRONMENT={found['ENVIRONMENT']} must be one of {', '.join(ENVIRONMENTS)}"
        )
    for name in _NAMES:
        if not found[name] and not (name == "CONTAINER" and found["ENVIRONMENT"] == "venv"):
            raise UserError(f"--site {path}: {name} is not set; {TEMPLATE} explains it")
    if found["ENVIRONMENT"] == "venv" and shutil.which(found["PYTHON"]) is None:
        raise UserError(f"--site {path}: PYTHON={found['PYTHON']} cannot be run; set it to the venv's python")
    site = Site(
        path=path,
        gpus_per_node=_number(path, "GPUS_PER_NODE", found),
        cpus_per_task=_number(path, "CPUS_PER_TASK", found),
        time_limit=found["TIME_LIMIT"],
        environment=found["ENVIRONMENT"],
        save_seconds=_number(path, "SAVE_SECONDS", found),
        sbatch_options=options,
    )
    if site.warning_seconds > LONGEST_WARNING:
        raise UserError(
            f"--site {path}: SAVE_SECONDS={site.save_seconds} is too large, because sbatch --signal accepts "
            f"at most {LONGEST_WARNING} s; set it to at most {(LONGEST_WARNING - 60) // 2}"
        )
    return site


def seconds_of(time_limit: str) -> int:
    """Convert a time limit to seconds: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        UserError: it has none of these forms.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time_limit)
    if match is None:
        raise UserError(
            f"the time limit {time_limit} is not in a form that sbatch accepts; write HH:MM:SS or D-HH:MM:SS"
        )
    days, *parts = (int(part) if part else None for part in match.groups())
    given = [part for part in parts if part is not None]
    units = [3600, 60, 1] if days is not None or len(given) == 3 else [60, 1]
    whole = sum(count * unit for count, unit in zip(given, units, strict=False))
    return (days or 0) * 86400 + whole


def _number(path: Path, name: str, found: dict[str, str]) -> int:
    if not found[name].isdecimal() or int(found[name]) < 1:
        raise UserError(f"--site {path}: {name}={found[name]} must be a whole number above 0")
    return int(found[name])
