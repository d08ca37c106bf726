"""Measures a run: speed, memory, and how the MeSH routers weight their slots."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_mesh.config.schema import Config
from megatron_mesh.config.sizes import flops_per_token
from megatron_mesh.recurrence import Scheme
from megatron_mesh.runtime import device


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if that overflows a float."""
    return math.exp(loss) if loss < 700 else math.inf


class SpeedMeter:
    """Measures the time per step since construction or the last ``read``. ``paused`` stops the clock."""

    def __init__(self, config: Config, step: int, consumed_samples: int):
        self.seq_length = config.model.seq_length
        self.flops_per_token = flops_per_token(config.model)
        self._step, self._samples = step, consumed_samples
        self._start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the enclosed work from the time per step. Waits for the device before and after."""
        device.synchronize()
        stopped = time.perf_counter()
        yield
        device.synchronize()
        self._start += time.perf_counter() - stopped

    def read(self, step: int, consumed_samples: int) -> dict[str, float]:
        """Return the speed since the last ``read`` and the peak memory of the fullest rank.

        Tokens/s are for the whole job; TFLOP/s are per device and count the unrolled network. Collective;
        waits for the device.

        Args:
            step: the step that has just ended.
            consumed_samples: samples that the run has consumed by then.
        """
        device.synchronize()
        now = time.perf_counter()
        elapsed = now - self._start
        seconds = elapsed / (step - self._step)
        tokens_per_second = (consumed_samples - self._samples) * self.seq_length / elapsed
        self._start, self._step, self._samples = now, step, consumed_samples
        flops = self.flops_per_token * tokens_per_second / dist.get_world_size()
        memory = torch.full((), device.peak_memory_bytes(), dtype=torch.float64, device=device.device())
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        speed = {
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_second,
            "tflops_per_device": flops / 1e12,
            "peak_memory_bytes": int(memory),
        }
        peak = device.peak_flops()
        return {**speed, "share_of_peak": flops / peak} if peak else speed


class RouterMeter:
    """Measures the routers' mean write and read weights per cycle and slot, and their entropy.

    Costs nothing outside ``observing``.
    """

    def __init__(self, scheme: Scheme | None, enabled: bool = True):
        """``scheme``: the recurrence; None on ranks without it, which are those after the first stage."""
        self.scheme = scheme if enabled and scheme is not None and scheme.uses_memory else None
        self._sums: dict[int, Tensor] = {}

    @contextmanager
    def observing(self, wanted: bool = True) -> Iterator[None]:
        """If ``wanted``, collect weights from the forward passes of the enclosed work."""
        if self.scheme is None or not wanted:
            yield
            return
        self._sums.clear()
        self.scheme.observer = self._observe
        try:
            yield
        finally:
            self.scheme.observer = None

    def _observe(self, cycle: int, write_SBN: Tensor, read_SBN: Tensor) -> None:
        rows = []
        for weights in (write_SBN, read_SBN):
            weights = weights.flatten(0, 1)
            entropy = torch.special.entr(weights).sum()
            count = torch.full_like(entropy, len(weights))
            rows.append(torch.cat([weights.sum(0), torch.stack([entropy, count])]))
        sums = torch.stack(rows).double()  # [2, N + 2]
        self._sums[cycle] = self._sums[cycle] + sums if cycle in self._sums else sums

    def read(self) -> dict[str, Any]:
        """Average over the tokens, micro-batches and ranks of the last ``observing``.

        Collective on the ranks that hold the routers; waits for the device.

        Returns:
            ``{"router": {"write": [cycle][slot], "read": [cycle][slot], "write_entropy": [cycle] (nats),
            "read_entropy": [cycle]}}``, or {} if the model has no routers.
        """
        if self.scheme is None:
            return {}
        sums = torch.stack([self._sums[cycle] for cycle in sorted(self._sums)])  # [K + 1, 2, N + 2]
        # Only the ranks of the first pipeline stage have routers.
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
        means = sums[..., :-1] / sums[..., -1:]
        router: dict[str, Any] = {}
        for kind, cycles in zip(("write", "read"), means.transpose(0, 1).tolist(), strict=True):
            router[kind] = [weights for *weights, _ in cycles]
            router[f"{kind}_entropy"] = [entropy for *_, entropy in cycles]
        return {"router": router}
