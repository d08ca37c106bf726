"""A step of the quickstart: a command that is shown as one would type it, then run."""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json


@dataclass(frozen=True)
class Step:
    """One command."""

    title: str
    program: Path
    flags: dict[str, object]
    """Flags with their values; None for a flag that takes none."""
    output: Path
    """Exists once the step is complete."""

    @property
    def command(self) -> list[str]:
        """The words of the command, with paths as short as they can be from here."""
        words = [str(from_here(Path(sys.executable))), str(from_here(self.program))]
        for flag, value in self.flags.items():
            words += [flag] if value is None else [flag, str(value)]
        return words

    @property
    def settings(self) -> dict[str, object]:
        """The flags that say what comes out, not where from and where to."""
        return {flag: value for flag, value in self.flags.items() if not isinstance(value, Path)}


def run_all(steps: list[Step], notes: Path) -> None:
    """Run the steps whose output is not there yet.

    ``notes`` is a JSON file of the settings of each step that is done, so that output which was made with
    other settings is not taken for what is asked.

    Raises:
        UserError: there is such output.
        SystemExit: a step failed; with its exit code.
    """
    done = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    for number, step in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {step.title}", flush=True)
        if not step.output.exists():
            _run(step)
            done[step.title] = step.settings
            notes.write_text(strict_json.dumps(done, indent=2) + "\n", encoding="utf-8")
        elif done.get(step.title, step.settings) == step.settings:
            print(f"already done: {step.output}", flush=True)
        else:
            made, wanted = (_spell(settings) for settings in (done[step.title], step.settings))
            raise UserError(
                f"{step.output} was made with {made}, not with {wanted}; choose another --output-dir"
            )


def _run(step: Step) -> None:
    print(shell(step.command), flush=True)
    start = time.monotonic()
    # Threads that wait give up their core: where other programs run, spinning ones slow a step down tenfold.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    code = subprocess.run(step.command, check=False, env=environment).returncode
    if code:
        print(
            f"\nThis step ended with code {code}. What is done is kept: once the cause is removed, the same "
            "command goes on from here.",
            file=sys.stderr,
        )
        sys.exit(code)
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


def _spell(settings: dict[str, object]) -> str:
    return " ".join(f"{flag} {value}" for flag, value in settings.items())


def shell(words: list[str]) -> str:
    """A command as one types it, broken before its flags if it is long."""
    line = shlex.join(words)
    return line if len(line) <= 110 else line.replace(" --", " \\\n    --")


def from_here(path: Path) -> Path:
    """``path``, relative if it lies below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
