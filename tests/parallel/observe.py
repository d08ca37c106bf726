"""Observe initial weights, pipeline traffic and gradient alignment. Runs in workers."""

from collections import Counter
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mesh.model.build import whole_model_parameters
from megatron_mesh.parallel import build_stage
from megatron_mesh.runtime.distributed import model_parallel_groups
from megatron_mesh.train.step import train_step
from tests.helpers import tiny_config
from tests.parallel.training import batches_of, build, settings_of


def initial_weights(case: dict[str, Any]) -> dict[str, tuple[np.ndarray, int | None, int]]:
    """Return this rank's weights by name, each with its sharded dimension and its shard number."""
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
    """Count the elements in ``isend`` and ``irecv`` in one step, by direction; add the pipeline rank."""
    config = tiny_config(world_size=dist.get_world_size(), **settings_of(case))
    sent: Counter[str] = Counter()
    with model_parallel_groups(config):
        stage, optimizer, state = build(config)
        group = parallel_state.get_pipeline_model_parallel_group()
        from megatron.core.pipeline_parallel import p2p_communication

        original = p2p_communication._p2p_ops

        def counting(**kwargs: Any) -> Any:
            before = Counter(wire)
            handles = original(**kwargs)
            handed = [kwargs[f"tensor_send_{to}"] for to in ("next", "prev")]
            for direction, tensor in zip(("forward", "backward"), handed, strict=True):
                sent[direction] += 0 if tensor is None else tensor.numel()
            taken = [kwargs[f"tensor_recv_{of}"] for of in ("prev", "next")]
            for direction, tensor in zip(("forward", "backward"), taken, strict=True):
                sent[f"received {direction}"] += 0 if tensor is None else tensor.numel()
            for kind, tensors in (("sent", handed), ("received", taken)):
                on_the_wire = wire[kind] - before[kind]
                assert on_the_wire == sum(t.numel() for t in tensors if t is not None)
            return handles

        wire: Counter[str] = Counter()
        plain = {"isend": dist.isend, "irecv": dist.irecv}

        def isend(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            wire["sent"] += tensor.numel()
            return plain["isend"](tensor, *args, **kwargs)

        def irecv(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            wire["received"] += tensor.numel()
            return plain["irecv"](tensor, *args, **kwargs)

        p2p_communication._p2p_ops = counting
        dist.isend, dist.irecv = isend, irecv  # type: ignore[assignment]
        try:
            train_step(stage, optimizer, state, batches_of(config, 0), config.training)
        finally:
            p2p_communication._p2p_ops = original
            dist.isend, dist.irecv = plain["isend"], plain["irecv"]  # type: ignore[assignment]
        return {**sent, "rank": group.rank()}


def unaligned_gradients(case: dict[str, Any]) -> tuple[int, list[str]]:
    """Count the matrices outside the recurrence; list those whose gradients cuBLAS can't add to."""
    config = tiny_config(world_size=dist.get_world_size(), **settings_of(case))
    with model_parallel_groups(config):
        named = [(n, p) for module in build_stage(config).modules for n, p in module.named_parameters()]
        matrices = [(n, p) for n, p in named if p.dim() == 2 and "recurrence." not in n]
        return len(matrices), [name for name, p in matrices if p.main_grad.data_ptr() % 16]
