"""Running out of memory ends a run with one message that lists remedies."""

import re
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch

from megatron_mesh.errors import OutOfMemory
from megatron_mesh.runtime import exits, health
from megatron_mesh.runtime.failures import Failures, explain_out_of_memory, remedies
from megatron_mesh.runtime.health import Health, report_failure
from megatron_mesh.train import pretrain, step
from tests.helpers import tiny_config

ROOT = Path(__file__).resolve().parents[3]
SAID = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


def full(*arguments: object, **keywords: object) -> None:
    raise torch.OutOfMemoryError(f"{SAID}\nand more of it")


def test_a_training_run(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(step, "run_batch", full)
    with pytest.raises(OutOfMemory, match=f"out of memory: {SAID}\ntry: --micro-batch-size 1") as error:
        pretrain(tiny(output_dir=str(tmp_path / "run")))
    assert "more of it" not in str(error.value)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize("script", ["pretrain_mesh.py", "tools/bench/steps.py"])
def test_the_command_prints_only_the_message(script, tmp_path, monkeypatch, capsys, corpus) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(step, "run_batch", full)
    sizes = "--layers 1+1R2+1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --vocab-size 128"
    own = {
        "pretrain_mesh.py": f"--data-path {corpus} --train-iters 2 --output-dir {tmp_path / 'run'}",
        "tools/bench/steps.py": "--steps 1 --variants base mesh plain",
    }
    monkeypatch.setattr(sys, "argv", [script, *sizes.split(), *own[script].split()])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ending.value.code == exits.CRASHED
    said = capsys.readouterr().err
    assert f"error: out of memory: {SAID}\ntry: " in said and "--recompute-granularity full" in said
    assert "--tensor-model-parallel-size" in said and "Traceback" not in said


def test_cpu_errors_are_recognized_and_others_pass() -> None:
    with pytest.raises(OutOfMemory, match="try: less"), explain_out_of_memory(lambda: ["less"]):
        torch.empty(2**60, dtype=torch.uint8)
    for words in (
        "CUDA error: out of memory\nmore",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`",
    ):
        with pytest.raises(OutOfMemory, match="try: less"), explain_out_of_memory(lambda: ["less"]):
            raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="shape") as error, explain_out_of_memory(lambda: ["less"]):
        torch.ones(2) @ torch.ones(3, 3)
    assert not isinstance(error.value, OutOfMemory)


def test_remedies_in_use_are_left_out() -> None:
    def flags(**settings: object) -> set[str]:
        return set(re.findall(r"--[a-z][a-z0-9-]+(?: \d+)?", " ".join(remedies(tiny_config(**settings)))))

    everything = flags(micro_batch_size=4)
    assert {"--micro-batch-size 2", "--bf16", "--use-distributed-optimizer"} <= everything
    assert {"--recompute-granularity", "--tensor-model-parallel-size 2"} <= everything
    used_up = {"bf16": True, "use_distributed_optimizer": True, "recompute_granularity": "full"}
    assert flags(micro_batch_size=1, **used_up) == {
        "--tensor-model-parallel-size 2",
        "--sequence-parallel",
        "--dry-run",
    }


def test_only_one_rank_reports(monkeypatch, capsys) -> None:
    """The ranks of a job end with ``os._exit``. The test replaces it with an exception."""

    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(health.os, "_exit", end)
    monkeypatch.setattr(health, "LINGER_SECONDS", 0.0)
    store = torch.distributed.HashStore()
    for rank in (3, 5):
        with (
            pytest.raises(Ended, match=str(exits.CRASHED)),
            report_failure(Health(rank, 8, Failures(store))),
        ):
            raise OutOfMemory("out of memory: what helps: less")
    said = capsys.readouterr().err
    place = f"rank 3 of 8 on host {socket.gethostname()}"
    assert said == f"error: {place} in the start: out of memory: what helps: less\n"
