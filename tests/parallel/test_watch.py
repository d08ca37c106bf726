"""``Watch`` detects every kind of wait, and counts only those of its own thread."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch

from megatron_mesh.runtime import device
from tests.parallel.watch import SYNCHRONIZING, Watch

ONE, SEVERAL = torch.ones(()), torch.arange(3.0)
WAITS: dict[str, Callable[[], object]] = {
    "item": lambda: ONE.item(),
    "tolist": lambda: SEVERAL.tolist(),
    "numpy": lambda: SEVERAL.numpy(),
    "cpu": lambda: SEVERAL.cpu(),
    "float": lambda: float(ONE),
    "int": lambda: int(ONE),
    "bool": lambda: bool(ONE),
    "if": lambda: 1 if ONE else 0,
    "comparison": lambda: (ONE > 0) and True,
    "equal": lambda: torch.equal(SEVERAL, SEVERAL),
    "allclose": lambda: torch.allclose(SEVERAL, SEVERAL),
    "nonzero": lambda: SEVERAL.nonzero(),
    "mask": lambda: SEVERAL[SEVERAL > 1],
    "to": lambda: SEVERAL.to("cpu"),
    "tensor": lambda: torch.tensor(1.0, device="cpu"),
    "device.synchronize": lambda: device.synchronize(),
    "device.seconds_between": lambda: device.seconds_between(0.0, 1.0),
    "device.copy_to_host": lambda: device.copy_to_host(SEVERAL),
    "torch.cuda.synchronize": lambda: torch.cuda.synchronize(),
    "torch.cuda.empty_cache": lambda: torch.cuda.empty_cache(),
    "Event.synchronize": lambda: torch.cuda.Event.synchronize(None),  # type: ignore[arg-type]
    "Stream.synchronize": lambda: torch.cuda.Stream.synchronize(None),  # type: ignore[arg-type]
    "torch.accelerator.synchronize": lambda: torch.accelerator.synchronize(),
}
NO_WAITS: dict[str, Callable[[], object]] = {
    "arithmetic": lambda: (SEVERAL * 2 + ONE).sum(),
    "copy": lambda: torch.empty(3).copy_(SEVERAL),
    "non-blocking": lambda: SEVERAL.to("cpu", non_blocking=True),
    "cast": lambda: SEVERAL.to(torch.float64),
}


def count(work: Callable[[], object]) -> int:
    """Return the number of waits that a watch counts in ``work``, on a machine with or without a GPU."""
    with ExitStack() as stack:
        for owner, name in SYNCHRONIZING:
            stack.enter_context(patch.object(owner, name, lambda *args: None))
        watch = stack.enter_context(Watch())
        work()
        return watch.seen.waits.total()


@pytest.mark.parametrize("kind", WAITS)
def test_a_wait_is_counted(kind: str) -> None:
    assert count(WAITS[kind]) >= 1


@pytest.mark.parametrize("kind", NO_WAITS)
def test_other_operations_are_not_counted(kind: str) -> None:
    assert count(NO_WAITS[kind]) == 0


def test_other_threads_are_not_counted() -> None:
    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: [SEVERAL.tolist(), SEVERAL.cpu(), device.synchronize()])
        thread.start()
        thread.join()

    assert count(elsewhere) == 0
