"""Run the steps of the quickstart: commands that are printed as you would type them."""

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
    """One command of the quickstart."""

    title: str
    program: Path
    flags: dict[str, object]
    """Flags and their values; None for a flag that takes no value."""
    output: Path
    """File or directory that exists once the step is complete."""

    @property
    def command(self) -> list[str]:
        """The words of the command line, with paths relative to the working directory where possible."""
        words = [str(from_here(Path(sys.executable))), str(from_here(self.program))]
        for flag, value in self.flags.items():
            words += [flag] if value is None else [flag, str(value)]
        return words

    @property
    def settings(self) -> dict[str, object]:
        """The flags that determine the result, without input and output paths."""
        return {flag: value for flag, value in self.flags.items() if not isinstance(value, Path)}


def run_all(steps: list[Step], notes: Path) -> None:
    """Run the steps that have no output yet.

    Args:
        notes: JSON file with the settings of each finished step. Existing output is used only if it was made
            with the same settings.

    Raises:
        UserError: existing output was made with other settings.
        SystemExit: a step failed; the exit status is the step's.
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
    # Waiting threads should give up their cores. If they spin, other programs make a step ten times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    code = subprocess.run(step.command, check=False, env=environment).returncode
    if code:
        print(
            f"\nThis step failed with exit status {code}. Fix the cause and run the same command again: it "
            "resumes from here.",
            file=sys.stderr,
        )
        sys.exit(code)
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


def _spell(settings: dict[str, object]) -> str:
    return " ".join(f"{flag} {value}" for flag, value in settings.items())


def shell(words: list[str]) -> str:
    """Spell the command as you would type it, with a line break before each flag if it is long."""
    line = shlex.join(words)
    return line if len(line) <= 110 else line.replace(" --", " \\\n    --")


def from_here(path: Path) -> Path:
    """Make ``path`` relative if it is below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
