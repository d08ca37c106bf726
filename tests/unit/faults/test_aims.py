"""The fault test spreads kills evenly and judges runs correctly."""

import json
import random
from collections import Counter

import pytest

from megatron_mesh.errors import UserError
from megatron_mesh.faults import kills as kills_module
from megatron_mesh.faults.aims import ALL, PHASES, Kill, parse_target, spread_kills
from megatron_mesh.faults.kills import KilledRun
from megatron_mesh.faults.mishaps import fault_table
from megatron_mesh.faults.runs import Setup, compare_losses, resume_error, resume_message


def test_a_hundred_kills_are_even_over_phases_and_victims() -> None:
    targets = spread_kills(100, random.Random(0))
    phases = Counter(target.phase for target in targets)
    assert set(phases) == set(PHASES) and min(phases.values()) == 7 and max(phases.values()) == 8
    for phase in PHASES:
        victims = Counter(target.victim for target in targets if target.phase is phase)
        assert set(victims) == set(phase.victims) and max(victims.values()) - min(victims.values()) <= 1


@pytest.mark.parametrize("text", ["rename", "renaming x all", "rename x the writer", ""])
def test_unknown_aims_are_user_errors(text) -> None:
    with pytest.raises(UserError, match="names no"):
        parse_target(text)


def test_held_ranks_and_victims() -> None:
    rng = random.Random(0)
    rename, step = parse_target("rename x one rank"), parse_target("a step x all")
    assert all(rename.victim_ranks(4, rng) != [0] for _ in range(50))
    assert rename.held_ranks([3]) == [0]  # rank 0 is held there when rank 3 is killed
    assert step.held_ranks(step.victim_ranks(4, rng)) == [0, 1, 2, 3]
    assert {parse_target("a step x the writer").victim_ranks(3, rng)[0] for _ in range(50)} == {0, 1, 2}


def test_the_number_of_saves_left(tmp_path) -> None:
    setup = Setup(tmp_path, ranks=2, steps=10, save_interval=4)
    assert [setup.saves_after(step) for step in (0, 3, 4, 8, 9, 10)] == [3, 3, 2, 1, 1, 0]


def test_the_message_of_a_start() -> None:
    loaded = "noise\nresumed at step 12 from /runs/x/iter_0000012\n"
    assert resume_message(loaded, stepped=False) == "resumes at 12"
    assert (
        resume_message("noise\n", stepped=True) == "a new run"
        and resume_message("noise\n", stepped=False) == ""
    )
    damaged = "the checkpoint /runs/x/iter_0000016 is damaged: no .metadata"
    assert resume_message(f"{damaged}\n{loaded}", stepped=True) == f"{damaged}; resumes at 12"


DAMAGED = "the checkpoint /runs/x/iter_{:07d} is damaged: no .metadata"


@pytest.mark.parametrize(
    ("said", "complete", "wrong"),
    [
        ("resumes at 8", [4, 8], ""),
        ("resumes at 4", [4, 8], "resumed at 4, but 8 was complete"),
        ("resumes at 4", [4, 8, 12], "resumed at 4, but 12 was complete"),
        (f"{DAMAGED.format(8)}; resumes at 4", [4, 8], ""),
        (f"{DAMAGED.format(12)}; {DAMAGED.format(8)}; resumes at 4", [4, 8, 12], ""),
        (f"{DAMAGED.format(12)}; resumes at 4", [4, 8, 12], "resumed at 4, but 8 was complete"),
        (f"{DAMAGED.format(4)}; resumes at 4", [4, 8], "resumed at 4, but 8 was complete"),
        ("resumes at 8", [4], "resumed at 8, where no checkpoint was complete"),
        ("a new run", [], ""),
        ("a new run", [4], "began a new run, but 4 was complete"),
        (f"{DAMAGED.format(4)}; a new run", [4], ""),
        ("", [4, 8], ""),  # killed before it printed anything
        (DAMAGED.format(8), [4, 8], ""),  # killed before it began
    ],
)
def test_a_start_resumes_from_the_newest_checkpoint(said, complete, wrong) -> None:
    assert resume_error(said, complete) == wrong


@pytest.mark.parametrize("damaged", [False, True])
def test_the_tool_fails_if_a_start_skips_a_checkpoint(damaged, tmp_path, monkeypatch) -> None:
    """The last start of a run, with a fake group of ranks."""
    setup = Setup(tmp_path, ranks=2, steps=10, save_interval=4)
    for name in ("calm", "run/iter_0000004", "run/iter_0000008"):
        (tmp_path / name).mkdir(parents=True)

    class FakeRanks:
        def __init__(self, *args, **settings) -> None:
            self.exit_codes, self.unfinished, self.phase_counts = [0, 0], [], Counter(["step"])
            self.output = f"resumed at step 4 from {tmp_path}/run/iter_0000004\n"
            if damaged:
                self.output = f"{DAMAGED.format(8)}\n{self.output}"

        def wait_until_ended(self) -> bool:
            return True

        def __enter__(self) -> "FakeRanks":
            return self

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(kills_module, "RankGroup", FakeRanks)
    run = KilledRun(setup, "run", random.Random(0))
    if damaged:
        run.finish()
        return
    with pytest.raises(AssertionError, match="resumed at 4, but 8 was complete; see"):
        run.finish()


def test_a_different_loss_is_detected(tmp_path) -> None:
    calm, hurt = tmp_path / "calm", tmp_path / "hurt"
    for directory in (calm, hurt):
        directory.mkdir()

    def write(directory, name, *losses):
        lines = [json.dumps({"kind": "train", "step": step, "loss": loss}) for step, loss in losses]
        (directory / name).write_text("\n".join(lines))

    write(calm, "metrics.jsonl", (1, 3.0), (2, 2.5))
    write(hurt, "metrics.1.jsonl", (1, 3.0))
    write(hurt, "metrics.jsonl", (1, 3.0), (2, 2.5))
    compare_losses(calm, hurt)
    write(hurt, "metrics.1.jsonl", (1, 3.0000001))  # before it was killed
    with pytest.raises(AssertionError, match="train 1"):
        compare_losses(calm, hurt)
    write(hurt, "metrics.1.jsonl", (1, 3.0), (3, 2.0))
    with pytest.raises(AssertionError, match="lacks"):
        compare_losses(calm, hurt)
    write(hurt, "metrics.jsonl", (1, 3.0))
    with pytest.raises(AssertionError, match="train 2"):
        compare_losses(calm, hurt)


def test_the_table_counts_by_phase_and_victim() -> None:
    rename = parse_target("rename x all")
    kills = [
        Kill(rename, 9, repeated=5, next_start="resumes at 4"),
        Kill(parse_target("start x all"), 2, repeated=0, next_start="a new run"),
        Kill(rename, 13, repeated=1, next_start="resumes at 12"),
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in fault_table(kills, []).splitlines()]
    assert rows[2] == ["start", ALL, "1", "0", "a new run"]
    assert rows[3] == ["rename", ALL, "2", "1 to 5", "resumes"]
