"""Programs end without a traceback when nobody reads their output, as in ``--help | head``."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import sys
from megatron_mesh.runtime.entry import closed_pipe_is_no_error
with closed_pipe_is_no_error():
    sys.stdin.read()  # until the test has closed both pipes
    {body}
"""


def ended(command: list[str]) -> tuple[int, str]:
    """Run a program whose output nobody reads; return its exit status and stderr."""
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.close()
    error = process.stderr.read()
    return process.wait(60), error


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("print('short')", 0),  # stays in the buffer
        ("print('short'); sys.exit(42)", 42),
        ("print('long ' * 99999); sys.exit(42)", 141),
        ("print('short'); raise BrokenPipeError('another pipe')", 141),
    ],
)
def test_exit_status_if_nobody_reads(body: str, status: int) -> None:
    assert ended([sys.executable, "-c", PROGRAM.replace("{body}", body)]) == (status, "")


def test_another_broken_pipe_is_an_error() -> None:
    code = PROGRAM.replace("{body}", "raise BrokenPipeError('another')").replace("sys.stdin.read()", "pass")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "BrokenPipeError: another" in done.stderr


def test_help_that_nobody_reads() -> None:
    status, error = ended([sys.executable, "tools/checkpoint.py", "--help"])
    assert status in (0, 141) and error == ""


def test_every_program_handles_a_closed_pipe() -> None:
    for path in [
        *(ROOT / "tools").glob("*.py"),
        *(ROOT / "examples").rglob("*.py"),
        ROOT / "pretrain_mesh.py",
    ]:
        _, main, tail = path.read_text().partition('if __name__ == "__main__":')
        assert not main or re.search(r"with closed_pipe_is_no_error\(\)|command\.run\(\s*main", tail), path
