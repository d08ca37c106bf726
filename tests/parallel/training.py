"""Train a few steps on any rank layout, and collect the results to compare. Runs in workers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.config.layout import batch_size_at
from megatron_mesh.config.schema import Config
from megatron_mesh.data import Batch
from megatron_mesh.model.build import whole_model_parameters
from megatron_mesh.parallel import Stage, build_stage
from megatron_mesh.runtime import profiling
from megatron_mesh.runtime.distributed import model_parallel_groups
from megatron_mesh.train.optimizer import build_optimizer, build_schedule
from megatron_mesh.train.step import train_step
from tests.helpers import randomise, tiny_config

STEPS = 4
"""Number of steps to train; the learning rate schedule covers ten."""


@dataclass
class Outcome:
    """The results of one rank."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    """Whole gradients after the first step's backward, by name in the whole model."""
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    """Whole weights after the last step, by name in the whole model."""


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a tiny run, overridden by ``case``."""
    return {
        "recurrence": "mesh",
        "layers": "1+3R2+1",
        "seq_length": 16,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "lr": 1e-3,
        "train_iters": 10,
        "lr_warmup_fraction": None,
        **case,
    }


def save_initial(directory: Path, case: dict[str, Any]) -> None:
    """Save the weights of a model without zeros. Runs in one process."""
    config = tiny_config(**settings_of(case))
    with model_parallel_groups(config):
        stage = build_stage(config)
        randomise(stage.modules[0])
        directory.mkdir(parents=True)
        dist_checkpointing.save(stage.sharded_state_dict(), str(directory))


def train(directory: Path, case: dict[str, Any], steps: int = STEPS, fault: Any = None) -> Outcome:
    """Train on all processes of the world, starting from the weights in ``directory``.

    Args:
        fault: a context manager that damages the stage during training.
    """
    config = tiny_config(world_size=dist.get_world_size(), **settings_of(case))
    outcome = Outcome()
    with model_parallel_groups(config):
        stage, optimizer, state = build(config)
        load(stage, optimizer, directory)

        @contextmanager
        def keep_gradients(name: str) -> Iterator[None]:
            if name == "agreement" and state.step == 0:  # later code may scale them
                outcome.gradients = whole_gradients(stage, config.parallel.use_distributed_optimizer)
            yield

        with fault(stage) if fault is not None else nullcontext(), profiling.watched_by(keep_gradients):
            for step in range(steps):
                size = batch_size_at(config.training, state.consumed_samples)
                batches = batches_of(config, step, size)
                taken = train_step(stage, optimizer, state, batches, config.training)
                outcome.losses.append(taken.loss)
                outcome.grad_norms.append(taken.grad_norm)
        with stage.parameters_gathered():
            outcome.weights = whole(stage, lambda parameter: parameter.data)
    return outcome


def build(config: Config) -> tuple[Stage, Any, TrainState]:
    """Build this rank's stage, optimizer and state. Megatron's process groups must exist."""
    stage = build_stage(config)
    optimizer = build_optimizer(config, stage)
    return stage, optimizer, TrainState(build_schedule(config.optimizer, optimizer))


def load(stage: Stage, optimizer: Any, directory: Path) -> None:
    """Load the weights from ``directory``."""
    loaded = dist_checkpointing.load(stage.sharded_state_dict(), str(directory))
    for index, module in enumerate(stage.modules):
        module.load_state_dict(loaded[str(index)])
    optimizer.reload_model_params()


def batches_of(config: Any, step: int, batch_size: int | None = None) -> Iterator[Batch]:
    """Yield this rank's micro-batches of a global batch that is the same on every rank layout."""
    model, training = config.model, config.training
    batch_size = batch_size or training.global_batch_size
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 96, (batch_size, model.seq_length + 1), generator=generator)
    mask = (torch.rand(ids[:, 1:].shape, generator=generator) < 0.7).float()
    ranks = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    size = training.micro_batch_size
    for start in range(rank * size, batch_size, ranks * size):
        rows = slice(start, start + size)
        positions = torch.arange(model.seq_length).expand(size, -1)
        yield Batch(ids[rows, :-1], ids[rows, 1:], mask[rows], positions)


def whole_gradients(stage: Stage, sharded: bool) -> dict[str, np.ndarray]:
    """Return the whole gradients of this rank's weights, as in one process. This is a collective."""
    if sharded:
        _unshard(stage)
    return whole(stage, lambda parameter: parameter.main_grad)


def whole(stage: Stage, of: Callable[[Any], torch.Tensor]) -> dict[str, np.ndarray]:
    """Gather a tensor of each parameter over tensor-parallel ranks; return by name in the whole model."""
    group = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for module in stage.modules:
        for name, parameter in whole_model_parameters(module):
            tensor = of(parameter)
            if getattr(parameter, "tensor_model_parallel", False):
                parts = [torch.empty_like(tensor) for _ in range(group.size())]
                dist.all_gather(parts, tensor.contiguous(), group=group)
                tensor = torch.cat(parts, parameter.partition_dim)
            found[name] = tensor.double().numpy().copy()
    return found


def _unshard(stage: Stage) -> None:
    """Gather the reduced gradients, of which the distributed optimizer leaves each rank only its shard."""
    group = parallel_state.get_data_parallel_group()
    for owner in stage.groups:
        for bucket_group in owner.bucket_groups:
            for bucket in bucket_group.buckets:
                mine = shard_buffer(bucket.grad_data, group.size())[group.rank()].clone()
                bucket.grad_data.zero_()
                shard_buffer(bucket.grad_data, group.size())[group.rank()].copy_(mine)
                dist.all_reduce(bucket.grad_data, group=group)
