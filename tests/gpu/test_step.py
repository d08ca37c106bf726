"""During a training step on a GPU, the host waits for the device only once.

Torch reports operations that make the host wait (``item``, ``nonzero``, blocking copies), but not
``synchronize`` on the device, an event or a stream. We patch those to count them.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_mesh.data import Batch
from megatron_mesh.runtime import device
from tests.helpers import one_process
from tests.parallel.watch import SYNCHRONIZING
from tools.bench.measure import Times, Variant, timed_step
from tools.bench.settings import StepSettings
from tools.bench.variants import batches_of, build_variant, variant_config

TOY = StepSettings(
    layers="1+1R2+1",
    hidden_size=64,
    num_attention_heads=2,
    vocab_size=128,
    seq_length=32,
    micro_batch_size=2,
    num_micro_batches=2,
)


@pytest.fixture(autouse=True)
def _on_a_gpu() -> None:
    if not device.has_gpu():
        pytest.skip("there is no GPU")


def waits(variant: Variant, batches: list[Batch]) -> Counter[str]:
    """Count where the host waits in one step, by file and line."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught, synchronizations() as found:
            warnings.simplefilter("always")
            variant.step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    synchronizing = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return found + Counter(f"{Path(w.filename).name}:{w.lineno}" for w in synchronizing)


@contextmanager
def synchronizations() -> Iterator[Counter[str]]:
    """Count calls of the functions in ``SYNCHRONIZING`` in the block, by the caller's file and line."""
    found: Counter[str] = Counter()

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            found[f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"] += 1
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, name in SYNCHRONIZING:
            stack.enter_context(patch.object(owner, name, counting(getattr(owner, name))))
        yield found


def test_every_kind_of_synchronization_is_counted() -> None:
    event = torch.cuda.Event()
    event.record()
    with synchronizations() as found:
        torch.cuda.synchronize()
        event.synchronize()
        torch.cuda.current_stream().synchronize()
    assert found.total() == 3 and len(found) == 3  # from three lines
    assert all(where.startswith("test_step.py:") for where in found)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["plain", "mesh"])
def test_the_host_waits_once(name: str, bf16: bool) -> None:
    settings = StepSettings(**{**vars(TOY), "bf16": bf16})
    config = variant_config(settings, name)
    batches = [
        Batch(**{field: x.contiguous().pin_memory() for field, x in vars(batch).items()})
        for batch in batches_of(settings)
    ]
    with one_process(config):
        variant = build_variant(name, config)
        for _ in range(2):  # the first steps allocate and compile
            variant.step(batches)
        found = waits(variant, batches)
    assert sum(found.values()) == 1 and next(iter(found)).startswith("vote.py:"), found


def test_every_part_of_a_step_takes_time() -> None:
    config = variant_config(TOY, "mesh")
    times = Times()
    with one_process(config):
        variant = build_variant("mesh", config)
        for _ in range(3):
            timed_step(variant, batches_of(TOY), times)
    assert min(*times.forward_backward, *times.communication, *times.optimizer) > 0
