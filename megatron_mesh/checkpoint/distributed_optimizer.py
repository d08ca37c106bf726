"""Two faults of Megatron-core 0.16.1's distributed optimizer at checkpoints, repaired on the object.

It saves states ("fully_reshardable") from a buffer without the padding between buckets, at places counted
with it: with several buckets, parts of the optimizer's state are written from the wrong place. And where its
Adam is torch's own, for want of Transformer Engine and apex, it cannot load what it has saved: torch keeps
a ``step`` with each parameter, which comes back as one tensor that all parameters share and would advance.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer

# Gathered to whole tensors at saving, so that any layout of ranks can load them.
CHECKPOINT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def repair(optimizer: MegatronOptimizer) -> None:
    """Make every distributed optimizer in ``optimizer`` save and load its own state; once."""
    for member in _members(optimizer):
        member.sharded_param_state_fully_reshardable = _Unpadded(member)
        member._set_main_param_and_optimizer_states = _StepsApart(member)


def prepare_loading(optimizer: MegatronOptimizer) -> None:
    """Give every distributed optimizer in ``optimizer`` a state: it loads into what is there."""
    for member in _members(optimizer):
        if not member.optimizer.state:
            member._init_optimizer_states_with_dummy_values()


def _members(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    members = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [member for member in members if isinstance(member, DistributedOptimizer)]


class _Unpadded:
    """``sharded_param_state_fully_reshardable`` with the places of an unpadded buffer."""

    def __init__(self, optimizer: DistributedOptimizer):
        self.optimizer = optimizer
        self.original = optimizer.sharded_param_state_fully_reshardable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _unpadded_places(self.optimizer.buffers):
            return self.original(*args, **kwargs)


@contextmanager
def _unpadded_places(buffers: list[Any]) -> Iterator[None]:
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        starts = [0, *accumulate(bucket.numel_unpadded for bucket in buffer.buckets)]
        buffer.param_index_map = {
            parameter: (
                start - buffer.buckets[bucket].offset + starts[bucket],
                end - buffer.buckets[bucket].offset + starts[bucket],
                bucket,
            )
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


class _StepsApart:
    """``_set_main_param_and_optimizer_states`` with a ``step`` for each parameter, where there is one."""

    def __init__(self, optimizer: DistributedOptimizer):
        self.optimizer = optimizer
        self.original = optimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def __call__(self, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group, order = self.optimizer.model_param_group_index_map[model_param]
        inner = self.optimizer.optimizer
        main = inner.param_groups[group]["params"][order]
        state = inner.state[main]
        tensors = {"param": main, **tensors}  # a float32 weight, which was loaded with the model
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors["step"] = state["step"]
        self.original(model_param, tensors)
