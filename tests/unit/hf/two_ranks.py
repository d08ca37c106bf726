"""Runs jobs on two processes with gloo."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from tests.unit.hf.models import IDS, SCHEMES, greedy, looped

Job = Callable[[int, dict[str, Path]], Any]


def on_two_ranks(job: Job, directories: dict[str, Path], scratch: Path) -> list[Any]:
    """Run ``job(rank, directories)`` on two ranks and return both results."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(job, rank, directories, scratch)) for rank in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        for rank, process in enumerate(processes):
            patch.setenv("HF_MODULES_CACHE", str(scratch / f"code-{rank}"))  # both write there
            process.start()
    for process in processes:
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
    errors = [path.read_text() for path in scratch.glob("error-*")]
    assert not errors and all(process.exitcode == 0 for process in processes), "\n".join(errors)
    return [torch.load(scratch / f"result-{rank}.pt") for rank in range(2)]


def _rank(job: Job, rank: int, directories: dict[str, Path], scratch: Path) -> None:
    torch.set_num_threads(1)
    # sys.path is inherited and includes the parent's copies of models' code.
    sys.path[:] = [path for path in sys.path if not (Path(path) / "transformers_modules").is_dir()]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    try:
        dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=2)
        torch.save(job(rank, directories), scratch / f"result-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (scratch / f"error-{rank}").write_text(traceback.format_exc())
        raise


def tensor_parallel(rank: int, directories: dict[str, Path]) -> dict[str, Any]:
    """Return, for each export, the size of this rank's shard of each parameter, logits, and greedy tokens."""
    results = {}
    for name, directory in directories.items():
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, tp_plan="auto").eval()
        with torch.no_grad():
            logits = model(IDS, use_cache=False).logits
        sizes = {  # transformers 4 renames some biases to _bias
            key.replace("._bias", ".bias"): _local(parameter).numel()
            for key, parameter in model.named_parameters()
        }
        results[name] = {"sizes": sizes, "logits": _whole(logits), "tokens": greedy(model)}
    return results


def checkpointed_ddp(rank: int, directories: dict[str, Path]) -> dict[str, Any]:
    """Return, for each scheme and kind of gradient checkpointing, the gradients averaged over both ranks."""
    ways: dict[str, Any] = {
        "kept": None,
        "default": {},
        "re-entrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "other": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    }
    results = {}
    for scheme in SCHEMES:
        for way, how in ways.items():
            model = looped(scheme).train()
            if how is not None:
                model.gradient_checkpointing_enable(**how)
            parallel = DistributedDataParallel(model)
            for _ in range(2):
                parallel.zero_grad()
                parallel(IDS[rank : rank + 1], labels=IDS[rank : rank + 1]).loss.backward()
            results[scheme, way] = {name: p.grad for name, p in model.named_parameters()}
    return results


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
