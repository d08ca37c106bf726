"""What workers report besides a training: weights, traffic, shares of the parameters."""

from collections import Counter
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mesh.model.naming import whole_model_parameters
from megatron_mesh.parallel import build_stage
from megatron_mesh.runtime.distributed import model_parallel_groups
from megatron_mesh.train.step import run_batch
from tests.helpers import tiny_config
from tests.parallel.training import _batches, settings_of


def initial_weights(case: dict[str, Any]) -> dict[str, tuple[np.ndarray, int | None, int]]:
    """This rank's weights by name, each with the dimension it is split along and the number of its part."""
    config = tiny_config(world_size=dist.get_world_size(), **settings_of(case))
    with model_parallel_groups(config):
        stage = build_stage(config)
        rank = parallel_state.get_tensor_model_parallel_rank()
        return {
            name: (
                p.detach().numpy().copy(),
                p.partition_dim if getattr(p, "tensor_model_parallel", False) else None,
                rank,
            )
            for module in stage.modules
            for name, p in whole_model_parameters(module)
        }


def elements_sent(case: dict[str, Any]) -> dict[str, Any]:
    """Elements given to ``isend`` in one step, by direction; and what was expected of this rank."""
    config = tiny_config(world_size=dist.get_world_size(), **settings_of(case))
    sent: Counter[str] = Counter()
    with model_parallel_groups(config):
        stage = build_stage(config)
        group = parallel_state.get_pipeline_model_parallel_group()
        from megatron.core.pipeline_parallel import p2p_communication

        original = p2p_communication._p2p_ops

        def counting(**kwargs: Any) -> Any:
            before = Counter(isends)
            handles = original(**kwargs)
            handed = [kwargs[f"tensor_send_{to}"] for to in ("next", "prev")]
            for direction, tensor in zip(("forward", "backward"), handed, strict=True):
                sent[direction] += 0 if tensor is None else tensor.numel()
            on_the_wire = isends["elements"] - before["elements"]
            assert on_the_wire == sum(t.numel() for t in handed if t is not None)
            return handles

        isends: Counter[str] = Counter()
        plain_isend = dist.isend

        def isend(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            isends["elements"] += tensor.numel()
            return plain_isend(tensor, *args, **kwargs)

        p2p_communication._p2p_ops = counting
        dist.isend = isend  # type: ignore[assignment]
        try:
            run_batch(stage, _batches(config, 0), config.training)
        finally:
            p2p_communication._p2p_ops = original
            dist.isend = plain_isend  # type: ignore[assignment]
        return {
            **sent,
            "rank": group.rank(),
            "parameters": sum(p.numel() for m in stage.modules for p in m.parameters()),
        }
