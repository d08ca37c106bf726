"""Jobs that cannot start: each cause is reported once, with host and rank, and no rank waits for another."""

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, write_settings
from tests.parallel.forked import end_ranks, start_ranks

HOST = socket.gethostname()
NO_WATCHDOG = ["--watchdog-timeout-minutes", 0]
Ended = tuple[list[int | None], list[str]]


def job(directory: Path, *command_lines: list[object] | None) -> Ended:
    """Run one rank per command line without a launcher, which would end the others.

    Args:
        directory: where the ranks' stderr is written.
        command_lines: flags of each rank; None for a rank that is never started.

    Returns:
        Exit codes and stderr of the ranks.
    """
    arguments = [None if line is None else (list(map(str, line)),) for line in command_lines]
    return end_ranks(start_ranks(_run_program, arguments, directory))


def _run_program(rank: int, flags: list[str]) -> None:
    program = str(ROOT / "pretrain_mesh.py")
    sys.argv = [program, *flags]
    runpy.run_path(program, run_name="__main__")


def fresh_job(*command_lines: list[object], **variables: str) -> Ended:
    """Run a job like ``job``, but in new interpreters that import everything.

    Args:
        variables: environment variables; ``RANK_1_NAME`` sets NAME only on rank 1.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(len(command_lines)), "PYTHONPATH": str(ROOT)}
    processes = []
    for rank, line in enumerate(command_lines):
        prefix = f"RANK_{rank}_"
        own = {
            name.removeprefix(prefix): value for name, value in variables.items() if name.startswith(prefix)
        }
        command = [sys.executable, ROOT / "pretrain_mesh.py", *map(str, line)]
        environment = {**os.environ, **common, "RANK": str(rank), **own}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], errors


def reported(errors: list[str]) -> list[tuple[int, str]]:
    """Parse lines ``error: rank R of N on host H: CAUSE`` into (R, CAUSE); allow no other errors."""
    lines = [line for text in errors for line in text.splitlines() if line.startswith("error: ")]
    found = [re.fullmatch(rf"error: rank (\d+) of \d+ on host {HOST}: (.*)", line) for line in lines]
    assert all(found), errors
    return [(int(match[1]), match[2]) for match in found if match]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> list[object]:
    """Flags that cause no error."""
    return ["--config", write_settings(tmp_path_factory.mktemp("settings"))]


def absent(name: str) -> list[object]:
    return ["--config", f"{name}.yaml"]


def cause(name: str) -> str:
    return f"--config {name}.yaml cannot be read: No such file or directory"


@pytest.mark.parametrize("failing", [0, 1])
def test_one_of_two_ranks_has_an_error(good, tmp_path: Path, failing: int) -> None:
    lines: list[list[object]] = [good, good]
    lines[failing] = [*absent("missing"), "--save", tmp_path]
    codes, errors = job(tmp_path, *lines)
    assert codes == [2, 2]
    assert reported(errors) == [(failing, cause("missing"))]
    expected = f"failed\nrank {failing} of 2 on host {HOST}: {cause('missing')}\n"
    assert (tmp_path / "run_status.txt").read_text() == expected


def test_an_error_on_four_ranks_is_reported_once(tmp_path: Path) -> None:
    codes, errors = job(tmp_path, *[absent("missing")] * 4)
    assert codes == [2] * 4
    assert [text for _, text in reported(errors)] == [cause("missing")]


def test_two_ranks_of_four_have_different_errors(good, tmp_path: Path) -> None:
    save = ["--save", tmp_path]
    codes, errors = job(tmp_path, good, [*absent("one"), *save], [*absent("two"), *save], good)
    assert codes == [2] * 4
    assert reported(errors) == [(1, cause("one")), (2, cause("two"))]
    word, *lines = (tmp_path / "run_status.txt").read_text().splitlines()
    assert word == "failed"
    assert sorted(lines) == [
        f"rank {rank} of 4 on host {HOST}: {cause(name)}" for rank, name in ((1, "one"), (2, "two"))
    ]


def test_an_import_that_fails_on_one_rank(good, tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron/__init__.py").write_text("raise OSError('libnvrtc.so: file too short')\n")
    codes, errors = fresh_job(good, good, RANK_1_PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert codes == [1, 1]
    assert f"error: rank 1 of 2 on host {HOST}: Traceback" in errors[1]
    assert errors[1].count("libnvrtc.so: file too short") == 1 or "raise OSError" in errors[1]
    assert "rror" not in errors[0]


def test_a_flag_of_the_wrong_type_is_reported_once(tmp_path: Path) -> None:
    codes, errors = job(tmp_path, ["--hidden-size", "wide"], ["--hidden-size", "wide"])
    assert codes == [2, 2]
    assert "".join(errors).count("--hidden-size wide is not a whole number") == 1


def test_help_is_shown_once(tmp_path: Path) -> None:
    codes, errors = job(tmp_path, ["--help"], ["--help"])
    assert codes == [0, 0] and errors == ["", ""]


def test_a_missing_rank_is_named(good, tmp_path: Path) -> None:
    line = [*good, "--global-batch-size", 6, "--distributed-timeout-minutes", 0.05, *NO_WATCHDOG]
    codes, errors = job(tmp_path, line, None, line)
    assert codes == [1, 1]
    ((_, text),) = reported(errors)
    assert text.startswith("1 of 3 ranks did not arrive within 3 s (--distributed-timeout-minutes): 1; check")


def test_no_rank_zero(good, tmp_path: Path) -> None:
    line = [*good, "--distributed-timeout-minutes", 0.05, *NO_WATCHDOG]
    codes, errors = job(tmp_path, None, line)
    assert codes == [1]
    assert reported(errors)[0][1].startswith("rank 0 does not answer at 127.0.0.1:")


def test_the_file_of_another_run_stays(tmp_path: Path) -> None:
    (tmp_path / "run_status.txt").write_text("done\n")
    job(tmp_path, [*absent("missing"), "--save", tmp_path], [*absent("missing"), "--save", tmp_path])
    assert (tmp_path / "run_status.txt").read_text() == "done\n"


def test_torchrun_reports_both_causes(tmp_path: Path) -> None:
    """torchrun's agent kills all processes as soon as one has ended."""
    script = tmp_path / "each.sh"
    script.write_text(f'exec {sys.executable} {ROOT}/pretrain_mesh.py --config "$RANK.yaml"\n')
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, "bash", str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 1
    for rank in (0, 1):
        assert f"error: rank {rank} of 2 on host {HOST}: {cause(str(rank))}" in ended.stderr
