"""Data-parallel gradient reduction for weights that several model chunks share.

A pipeline rank of a looped model has three weight groups: prelude and embedding, core and routers, coda and
head. If the cores are distinct, each is a group. Every group is wrapped in its own
``DistributedDataParallel``, because the groups finish their gradients at different times. A shared core, for
example, is complete only after pass 1 of the last micro-batch: backwards run from the last pass to the first.
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
from megatron_mesh.runtime import profiling


class WeightGroup(MegatronModule):
    """Modules of a model whose gradients are complete at the same time.

    The first and last groups stand in for a model's first and last chunks: ``finalize_model_grads`` takes the
    two copies of a tied embedding from them and sums their gradients.
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
    """Build the groups in the order of the passes: prelude, core or cores, coda."""
    block = model.decoder
    prelude, *cores, coda = [section for _, section in block.sections()]
    embedding, head = getattr(model, "embedding", None), getattr(model, "output_layer", None)
    # Every cycle adds to the routers' gradients, and pass 1 is the last to do so, as for the first core.
    # The routers come first in their group for the reason given in ``MeshGPTModel.named_parameters``.
    looped: list[list[torch.nn.Module | None]] = [[core] for core in cores]
    looped[0].insert(0, block.recurrence)
    modules = [[prelude, embedding], *looped, [coda, block.final_layernorm, head]]
    last = len(modules) - 1
    return [
        WeightGroup(model, members, first=model.pre_process and i == 0, last=model.post_process and i == last)
        for i, members in enumerate(modules)
    ]


def wrap(modules: Sequence[MegatronModule], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Wrap each module: float32 gradients, reduced over the data-parallel ranks."""
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
    """Return, for each pass, the reduction to start after its backward of the last micro-batch."""
    prelude, *cores, coda = groups
    if len(cores) == 1:
        # Backwards run from the last pass to the first, so a shared core is complete after pass 1.
        core_starts = [cores[0].start_grad_sync, *[_do_nothing] * (passes - 3)]
    else:
        # The routers belong to the first core's group, which pass 1 completes.
        core_starts = [core.start_grad_sync for core in cores]
    return [prelude.start_grad_sync, *core_starts, coda.start_grad_sync]


def _do_nothing(*parameters: Any) -> None:
    """Start no reduction: earlier passes still have to add to these gradients."""


@contextmanager
def no_sync(groups: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Suspend gradient reductions of all groups, as ``DistributedDataParallel.no_sync`` does for one."""
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
    """Run Megatron-core's ``finalize_model_grads`` on the weight groups, then the reductions that it lacks.

    Args:
        groups: the weight groups.
        _chunks: the chunks that the schedule ran. The schedule passes them, but they are ignored because
            several of them may be views of one group.
        num_tokens: the number of tokens in this rank's micro-batches. The gradients are divided by its sum
            over all ranks.
    """
    with profiling.named("communication"):
        finalize_model_grads(groups, None, **kwargs)
        if num_tokens is not None:
            _divide_by_tokens(groups, num_tokens)
        _sum_over_tensor_parallel(groups)


def _divide_by_tokens(groups: Sequence[DistributedDataParallel], num_tokens: Tensor) -> None:
    """Divide the gradients by the number of tokens in the global batch, without waiting for the device.

    ``finalize_model_grads`` would use two collectives and read ``num_tokens > 0`` on the host once per group.
    One all-reduce over all ranks is enough: only the last pipeline stage counts tokens, and the ranks of a
    tensor-parallel group count the same ones. If there are no tokens, the gradients are already zero.
    """
    dist.all_reduce(num_tokens)
    scale = parallel_state.get_tensor_model_parallel_world_size() / num_tokens.clamp(min=1)
    for group in groups:
        group.scale_gradients(scale)


def _sum_over_tensor_parallel(groups: Sequence[DistributedDataParallel]) -> None:
    """Sum the gradients of weights that see sequence shards without sequence parallelism (see block.py).

    The order of the reductions doesn't matter, because they are linear and clipping comes later. With the
    distributed optimizer a rank holds reduced gradients only for its shard, but all ranks of a
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
