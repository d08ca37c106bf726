"""A run that is killed, stopped or out of disk space in any phase resumes with the same losses."""

import pytest

from tests.commands import tool

AIMS = [
    "between data and .metadata x rank 0",
    "loading x one rank",
]


def test_chosen_faults(tmp_path, capsys) -> None:
    aims = [word for aim in AIMS for word in ("--aim", aim)]
    mishaps = ["--stops", "1", "--hangs", "0", "--full-disks", "1"]
    assert not tool("fault_test")(
        [*aims, *mishaps, "--steps", "24", "--output-dir", str(tmp_path / "faults")]
    )
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[0] == "|"][
        2:
    ]
    assert {f"{phase} x {victim}" for phase, victim, *_ in rows} >= set(AIMS)
    assert all(said == "resumes" for phase, victim, *_, said in rows if f"{phase} x {victim}" in AIMS)
    assert "every loss is the undisturbed run's" in out and "SIGSTOP" in out
    if "not done: filling the disk" in out:
        pytest.skip(out.splitlines()[-2])
    assert any(phase.startswith("the disk is full") and "No space left" in said for phase, *_, said in rows)
