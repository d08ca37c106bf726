"""Data-parallel gradient reduction for weights that several model chunks share.

A pipeline rank of a looped model has its weights in groups: prelude and embedding, core and routers (one
group per core where they are not shared), coda and head. Each group is a ``DistributedDataParallel`` of its
own, since its gradients are complete at its own moment: those of a shared core after the backward of pass 1
of the last micro-batch, which runs as the last of the loop.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mesh.config.schema import ParallelConfig
from megatron_mesh.model import MeshGPTModel
from megatron_mesh.runtime import ranges


class WeightGroup(MegatronModule):
    """Modules of a model whose gradients are complete at the same moment.

    ``finalize_model_grads`` asks the first and the last group for what it asks of a model's first and last
    chunk: the copies of a tied embedding, whose gradients it sums.
    """

    def __init__(
        self, model: MeshGPTModel, modules: Sequence[torch.nn.Module | None], *, first: bool, last: bool
    ):
        super().__init__(model.config)
        self.members = torch.nn.ModuleList(module for module in modules if module is not None)
        self.pre_process, self.post_process = first, last
        self.share_embeddings_and_output_weights = model.share_embeddings_and_output_weights
        self.shared_embedding_or_output_weight = model.shared_embedding_or_output_weight


def ring_groups(model: MeshGPTModel) -> list[WeightGroup]:
    """The groups in the order of the passes: prelude, core or cores, coda."""
    block = model.decoder
    prelude, *cores, coda = [section for _, section in block.sections()]
    embedding, head = getattr(model, "embedding", None), getattr(model, "output_layer", None)
    # The routers' gradients come with every cycle; the last to come is that of pass 1.
    # They are the first of their group for the reason in ``MeshGPTModel.named_parameters``.
    looped: list[list[torch.nn.Module | None]] = [[core] for core in cores]
    looped[0].insert(0, block.recurrence)
    modules = [[prelude, embedding], *looped, [coda, block.final_layernorm, head]]
    last = len(modules) - 1
    return [
        WeightGroup(model, members, first=model.pre_process and i == 0, last=model.post_process and i == last)
        for i, members in enumerate(modules)
    ]


def wrap(modules: Sequence[MegatronModule], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Give each module gradients in float32 buffers, reduced over the data-parallel ranks."""
    ddp = partial(
        DistributedDataParallelConfig,
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.ddp_bucket_size,
    )
    return [
        DistributedDataParallel(module.config, ddp(fp8_param_gather=module.config.fp8_param), module)
        for module in modules
    ]


def ring_sync_order(groups: Sequence[DistributedDataParallel], passes: int) -> list[Callable[..., None]]:
    """What to start when the backward of each pass is done for the last micro-batch (by pass)."""
    prelude, *cores, coda = groups
    if len(cores) == 1:
        # Backward runs the passes in descending order: a shared core is complete after pass 1.
        core_starts = [cores[0].start_grad_sync, *[_nothing] * (passes - 3)]
    else:
        # The routers are in the first core's group.
        core_starts = [core.start_grad_sync for core in cores]
    return [prelude.start_grad_sync, *core_starts, coda.start_grad_sync]


def _nothing(*parameters: Any) -> None:
    """The gradients of this pass's weights are not complete yet."""


@contextmanager
def no_sync(groups: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """No group starts a reduction inside."""
    with ExitStack() as stack:
        for group in groups:
            stack.enter_context(group.no_sync())
        yield


def finalize(
    groups: Sequence[DistributedDataParallel],
    _chunks: Sequence[torch.nn.Module],
    num_tokens: Tensor | None = None,
    **kwargs: Any,
) -> None:
    """Run Megatron-core's ``finalize_model_grads`` on the weight groups, and the reductions it leaves out.

    Args:
        groups: own the weights.
        _chunks: the chunks that the schedule ran, passed by the schedule. Unused: several of them may be
            views of one group.
        num_tokens: tokens of this rank's micro-batches. The gradients are divided by their sum over all
            ranks.
    """
    with ranges.named("communication"):
        finalize_model_grads(groups, None, **kwargs)
        if num_tokens is not None:
            _divide_by_tokens(groups, num_tokens)
        _sum_over_tensor_parallel(groups)


def _divide_by_tokens(groups: Sequence[DistributedDataParallel], num_tokens: Tensor) -> None:
    """Divide the gradients by the number of tokens in the global batch, without waiting for the device.

    ``finalize_model_grads`` would read ``num_tokens > 0`` on the host once per group, and use two
    collectives. Here one all-reduce over all ranks is enough: only the last pipeline stage counts tokens, and
    the ranks of a tensor-parallel group count the same ones. Without any token the gradients are zero
    already.
    """
    dist.all_reduce(num_tokens)
    scale = parallel_state.get_tensor_model_parallel_world_size() / num_tokens.clamp(min=1)
    for group in groups:
        group.scale_gradients(scale)


def _sum_over_tensor_parallel(groups: Sequence[DistributedDataParallel]) -> None:
    """Sum gradients of weights that see sequence shards without sequence parallelism (see block.py).

    This may come after the other reductions because all of them are linear; clipping comes later. With the
    distributed optimizer each rank holds reduced gradients of its own shard only, but all ranks of a
    tensor-parallel group hold the same shard.
    """
    grads = [
        parameter.main_grad
        for group in groups
        for parameter in group.module.parameters()
        if getattr(parameter, "sum_over_tensor_parallel", False)
    ]
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=parallel_state.get_tensor_model_parallel_group())
        for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))
