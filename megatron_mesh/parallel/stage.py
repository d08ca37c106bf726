"""Build this rank's stage: modules that own weights, chunks that the schedule runs, and weight groups.

Without a pipeline, one model is all three. A looped model on a pipeline runs as a ring (``ring.py``). A plain
model on a pipeline is split as in Megatron-core.
"""

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
from megatron_mesh.model.transformer_config import MeshTransformerConfig
from megatron_mesh.parallel.gradients import finalize, no_sync, ring_groups, ring_sync_order, wrap
from megatron_mesh.parallel.ring import ring_chunks
from megatron_mesh.recurrence import SCHEMES, Scheme


@dataclass
class Stage:
    """A rank's share of the model. Without a pipeline, the model is its only module, chunk and group."""

    modules: list[MeshGPTModel]
    """The modules that own the weights."""
    chunks: list[Any]
    """The model chunks that the schedule runs: one per virtual stage."""
    groups: list[DistributedDataParallel]
    """The weight groups, which hold and reduce gradients; every weight is in exactly one."""
    group_size: Callable[[int], int] | None = None
    """Maps the number of micro-batches to the schedule's group size; None without virtual stages."""

    @property
    def config(self) -> MeshTransformerConfig:
        """Megatron's configuration, shared by all chunks."""
        return self.modules[0].config

    @property
    def recurrence(self) -> Scheme | None:
        """The scheme with its routers; None on ranks that don't hold it."""
        return getattr(self.modules[0].decoder, "recurrence", None)

    def set_micro_batches(self, micro_batches: int) -> None:
        """Set the number of micro-batches per rank in the next step; it decides the schedule's groups."""
        if self.group_size is not None:
            for settings in {id(m.config): m.config for m in self.modules}.values():
                settings.microbatch_group_size_per_vp_stage = self.group_size(micro_batches)

    def zero_grad_buffer(self) -> None:
        """Set all gradients to zero."""
        for group in self.groups:
            group.zero_grad_buffer()

    def train(self, mode: bool = True) -> None:
        """Switch to training mode or, with False, to evaluation mode."""
        for module in [*self.modules, *self.chunks]:
            module.train(mode)

    @contextmanager
    def parameters_gathered(self) -> Iterator[None]:
        """Gather all parameters on entry, so that evaluation uses current ones, and run no gather inside.

        With ``overlap_param_gather``, parameters are stale after a training step until the next forward
        gathers them.
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
        """The weights under their checkpoint keys, which are the same for every rank layout."""
        return {str(i): module.sharded_state_dict() for i, module in enumerate(self.modules)}

    def data_for_chunks(self, batches: Iterator[Batch]) -> list[Iterator[Batch | None]]:
        """Return one iterator per chunk: micro-batches if the chunk reads data, otherwise endless None."""
        return [batches if chunk_reads(chunk) else repeat(None) for chunk in self.chunks]


def chunk_reads(chunk: Any) -> bool:
    """Whether a chunk reads tokens (the first one) or labels (the last one); no pipeline rank has both."""
    model = getattr(chunk, "module", chunk)
    return model.pre_process or model.post_process


def build_stage(config: Config, *, initial_weights: bool = True) -> Stage:
    """Build this rank's stage. Megatron's process groups must exist.

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
    """Build a stage in which every module (a ``GPTModel``) is both a chunk and a weight group."""
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
    """Build the chunks of a plain model as in Megatron's pipeline."""
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
    """Install the gradient hooks, which Megatron's schedule reads from the model's configuration."""
    parallel = config.parallel
    # All chunks of a looped model share one configuration object; each chunk of a plain model has its own.
    # We leave ``deallocate_pipeline_outputs`` off, because Megatron frees some outputs before their send has
    # completed. That breaks gloo; NCCL was not tested.
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
