"""What all tools share: parsing of options, ``--help``, one-line errors and exit statuses."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from tyro.conf import Positional, UseAppendAction

from megatron_mesh import command
from megatron_mesh.errors import OutOfMemory, UserError

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if "command.run(" in path.read_text())


@dataclass
class Limits:
    """Limits of the work."""

    seconds: float = 4.0
    """Seconds that it may take,
    -1 for any."""
    batch: int | Literal["auto"] = 8
    """Size of a batch."""


@dataclass
class Options:
    """Options of the example."""

    place: Positional[Path]
    """Where it works."""
    load: Path
    """What it reads."""
    limits: Limits
    save: Path | None = None
    """What it writes. (default: nothing)"""
    names: tuple[str, ...] = ()
    """Names."""
    note: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A note."""
    force: bool = False
    """Replace what is there."""
    tokens: tuple[int, ...] = field(default_factory=lambda: (1, 2))
    """Numbers."""


def main(options: Options, others: list[str]) -> int:
    assert others in ([], ["--other", "7"])
    return len(options.names)


def only_options(options: Options) -> None:
    raise AssertionError("not reached")


def parsed(line: str) -> Options:
    found: list[Options] = []

    def keep(options: Options) -> None:
        found.append(options)

    command.call(keep, line.split())
    return found[0]


def test_options_of_every_kind() -> None:
    assert parsed("here --load a") == Options(Path("here"), Path("a"), Limits())
    line = (
        "--load a --names b c --note d --note e --force --tokens 5 --seconds 1.5 --batch auto --save=f here"
    )
    assert parsed(line) == Options(
        Path("here"), Path("a"), Limits(1.5, "auto"), Path("f"), ("b", "c"), ("d", "e"), True, (5,)
    )


def test_unknown_options_go_to_a_main_that_takes_them() -> None:
    assert command.call(main, ["here", "--load", "a", "--other", "7", "--names", "x", "y"]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("here", "--load is missing; see --help"),
        ("--force", "PATH, --load are missing; see --help"),
        ("here --load", "--load needs a value; see --help"),
        ("here --load a --frce", "unknown option --frce; did you mean --force?"),
        ("here there --load a", "unknown argument there; see --help"),
        ("here --load a --seconds x", "--seconds x is not a number; see --help"),
        ("here --load a --batch x", "--batch x is not INT|{auto}; see --help"),
    ],
)
def test_errors_are_one_line(line: str, message: str, monkeypatch) -> None:
    for encoding in ("utf-8", "latin-1"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        with pytest.raises(UserError) as error:
            command.call(only_options, line.split())
        assert str(error.value) == message


def test_help_has_the_docstring_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.call(only_options, ["--help"])
    assert not end.value.code
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert text.startswith("What all tools share")
    assert "Seconds that it may take, -1 for any. (default: 4.0)" in text
    assert "What it writes. (default: nothing)" in text and "unset" not in text
    assert "limits options" in text and "Limits of the work." in text and "None" not in text


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (UserError("bad"), 2, "error: bad\n"),
        (OutOfMemory("full"), 1, "error: full\n"),
        (KeyboardInterrupt(), 130, "\nStopped.\n"),
    ],
)
def test_an_error_is_one_line_with_its_exit_status(
    error: BaseException, status: int, printed: str, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def main(options: Limits) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["tool"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        command.run(main, if_interrupted="Stopped.")
    assert end.value.code == status
    assert capsys.readouterr().err == printed
    assert signal.getsignal(signal.SIGINT) is before


def test_a_process_that_does_not_print_errors_still_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "--seconds"])
    with pytest.raises(SystemExit, match="2"):
        command.run(not_reached, prints_errors=lambda: False)
    assert capsys.readouterr().err == ""


def not_reached(options: Limits) -> None:
    raise AssertionError("not reached")


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_every_tool_shows_its_help_without_importing_torch(path: Path) -> None:
    command = [sys.executable, "-X", "importtime", path, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imports, errors = [], []
    for line in done.stderr.splitlines():
        (imports if line.startswith("import time:") else errors).append(line.rpartition("|")[2].strip())
    assert done.returncode == 0 and not errors
    assert "tyro" in imports and not {"torch", "megatron.core"} & set(imports)
    assert f"python tools/{path.name}" in done.stdout and "(default: None)" not in done.stdout


@pytest.fixture
def interruptible(tmp_path: Path) -> Iterator[Path]:
    """A tool whose ``main`` prints "ready" and waits."""
    path = tmp_path / "waiting.py"
    path.write_text(
        '"""Wait."""\nimport time\nfrom dataclasses import dataclass\nfrom megatron_mesh import command\n'
        "@dataclass\nclass Options:\n    seconds: int = 60\n"
        "def main(options: Options) -> None:\n"
        "    print('ready', flush=True)\n    time.sleep(options.seconds)\n"
        "command.run(main, removes_files=True)\n"
    )
    yield path


def test_help_of_a_module_shows_how_to_run_it(interruptible: Path) -> None:
    line = [sys.executable, "-m", interruptible.stem, "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=interruptible.parent, env=environment, capture_output=True, text=True)
    assert "usage: python -m waiting [-h]" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_a_tool_quietly(interruptible: Path, kind: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, interruptible],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )
    assert process.stdout and process.stderr and process.stdout.readline() == b"ready\n"
    time.sleep(0.1)
    process.send_signal(kind)
    assert process.wait(30) == command.INTERRUPTED and process.stderr.read() == b""
