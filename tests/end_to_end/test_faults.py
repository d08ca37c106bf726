"""A run that is killed again and again ends as if it had not been."""

from tools.fault_test import main


def test_five_kills(tmp_path, capsys) -> None:
    assert main(["--kills", "5", "--steps", "100", "--output-dir", str(tmp_path / "faults")]) == 0
    out = capsys.readouterr().out
    assert "5 kills" in out and "every step's loss is the undisturbed run's" in out
