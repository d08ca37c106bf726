"""This rank's share of the model: who owns the weights, what the schedule runs, how gradients meet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_mesh.config.placement import microbatch_group_size, placement, virtual_stages
from megatron_mesh.config.schema import Config
from megatron_mesh.data import Batch
from megatron_mesh.model import MeshGPTModel, build_model
from megatron_mesh.model.config import MeshTransformerConfig
from megatron_mesh.parallel.gradients import finalize, no_sync, ring_groups, ring_sync_order, wrap
from megatron_mesh.parallel.ring import ring_chunks
from megatron_mesh.recurrence import SCHEMES, Scheme


@dataclass
class Stage:
    """A rank's share of the model. Without a pipeline, the model is its only module, chunk and group."""

    modules: list[MeshGPTModel]
    """Own the weights."""
    chunks: list[Any]
    """What the schedule runs: one, or a chunk for each virtual stage."""
    groups: list[DistributedDataParallel]
    """Hold the gradients and reduce them; every weight is in exactly one."""
    group_size: Callable[[int], int] | None = None
    """``microbatch_group_size`` for a number of micro-batches; None without virtual stages."""

    @property
    def config(self) -> MeshTransformerConfig:
        """Megatron's configuration, shared by all chunks."""
        return self.modules[0].config

    @property
    def recurrence(self) -> Scheme | None:
        """The scheme with its routers, on the ranks that have it."""
        return getattr(self.modules[0].decoder, "recurrence", None)

    def expect(self, micro_batches: int) -> None:
        """Tell the interleaved schedule how many micro-batches the next step has on each rank."""
        if self.group_size is not None:
            for settings in {id(m.config): m.config for m in self.modules}.values():
                settings.microbatch_group_size_per_vp_stage = self.group_size(micro_batches)

    def zero_grad_buffer(self) -> None:
        """Set all gradients to zero."""
        for group in self.groups:
            group.zero_grad_buffer()

    def train(self, mode: bool = True) -> None:
        """Training or, with False, evaluation."""
        for module in [*self.modules, *self.chunks]:
            module.train(mode)

    @contextmanager
    def parameters_gathered(self) -> Iterator[None]:
        """All parameters are up to date inside, for evaluation, and no gathering is under way.

        With ``overlap_param_gather``, a training step leaves them to be gathered by the next forward pass.
        """
        hooked = [group for group in self.groups if group.use_forward_hook]
        for group in hooked:
            group.disable_forward_pre_hook()
        try:
            yield
        finally:
            for group in hooked:
                group.enable_forward_pre_hook()

    def sharded_state_dict(self) -> dict[str, Any]:
        """The weights as a checkpoint has them: its keys do not depend on the layout of the ranks."""
        return {str(i): module.sharded_state_dict() for i, module in enumerate(self.modules)}

    def data_for_chunks(self, batches: Iterator[Batch]) -> list[Iterator[Batch | None]]:
        """Micro-batches for the chunk that takes them, None over and over for the others."""
        return [batches if chunk_reads(chunk) else repeat(None) for chunk in self.chunks]


def chunk_reads(chunk: Any) -> bool:
    """Whether a chunk takes tokens (the first) or labels (the last); no rank of a pipeline has both."""
    model = getattr(chunk, "module", chunk)
    return model.pre_process or model.post_process


def build_stage(config: Config, *, initial_weights: bool = True) -> Stage:
    """Build this rank's share. Megatron's process groups must exist.

    Args:
        initial_weights: draw the weights. If False they are zero, for a checkpoint to fill.
    """
    ranks = config.parallel.pipeline_model_parallel_size
    if ranks == 1:
        return plain_stage([build_model(config, initial_weights=initial_weights)], config)
    if SCHEMES[config.model.recurrence].has_loop:
        return _ring(config, initial_weights)
    return plain_stage(_plain_chunks(config, initial_weights), config)


def plain_stage(modules: list[Any], config: Config) -> Stage:
    """Every module (a ``GPTModel``) is a chunk of the schedule, and a group of weights of its own."""
    groups = wrap(modules, config.parallel)
    return _with_schedule(Stage(modules, list(groups), groups), config)


def _ring(config: Config, initial_weights: bool) -> Stage:
    rank = parallel_state.get_pipeline_model_parallel_rank()
    part = placement(config.model, config.parallel).part(rank)
    stages = virtual_stages(config.model, config.parallel)
    assert stages is not None
    stage = 0 if part.first else stages - 1
    model = build_model(config, part, initial_weights=initial_weights, vp_stage=stage)
    groups = wrap(ring_groups(model), config.parallel)
    return _with_schedule(Stage([model], ring_chunks(model), groups), config)


def _plain_chunks(config: Config, initial_weights: bool) -> list[MeshGPTModel]:
    """Megatron's own pipeline of a plain model."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    last = config.parallel.pipeline_model_parallel_size - 1
    stages = virtual_stages(config.model, config.parallel) or 1
    return [
        build_model(
            config,
            initial_weights=initial_weights,
            pre_process=(rank, stage) == (0, 0),
            post_process=(rank, stage) == (last, stages - 1),
            vp_stage=stage if stages > 1 else None,
        )
        for stage in range(stages)
    ]


def _with_schedule(stage: Stage, config: Config) -> Stage:
    """Tell the schedule how gradients are synchronised, by Megatron's hooks in its configuration."""
    parallel = config.parallel
    # A looped model has one such object (its sections have copies, made before), chunks of a plain one each
    # their own. Outputs that were sent are not freed early (``deallocate_pipeline_outputs``): Megatron frees
    # some before it has waited for the send, which breaks gloo and was not tried on NCCL.
    for settings in {id(m.config): m.config for m in stage.modules}.values():
        settings.finalize_model_grads_func = partial(finalize, stage.groups)
        if parallel.overlap_grad_reduce:
            settings.no_sync_func = partial(no_sync, stage.groups)
        stages = virtual_stages(config.model, parallel)
        if stages is None:
            continue
        stage.group_size = partial(microbatch_group_size, parallel)
        if parallel.overlap_grad_reduce:
            looped = SCHEMES[config.model.recurrence].has_loop
            settings.grad_sync_func = (
                ring_sync_order(stage.groups, stages)
                if looped
                else [group.start_grad_sync for group in stage.groups]
            )
    return stage
