"""Helpers that several tests share."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.runtime.distributed import process_groups
from megatron_mesh.runtime.health import Health


def tiny_config(recurrence: str = "mesh", layers: str = "1+2R2+1", world_size: int = 1, **settings) -> Config:
    """A resolved configuration of a model that runs in milliseconds. Any setting can be given by name."""
    config = Config()
    values = {
        "recurrence": recurrence,
        "layers": layers,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 16,
        "vocab_size": 96,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "train_iters": 10,
        "eval_iters": 2,
        "lr_warmup_fraction": 0.1,
        **settings,
    }
    for name, value in values.items():
        group = next(g for g in vars(config).values() if hasattr(g, name))
        setattr(group, name, value)
    return resolve(config, world_size=world_size)


@contextmanager
def one_process(config: Config) -> Iterator[Health]:
    """Megatron's process groups, with this process as the only member."""
    torch.set_num_threads(1)
    with process_groups(config) as health:
        yield health


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Draw routers, biases and norms from N(0, std), because zeros and near-uniform routers hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "recurrence" in name or "layernorm" in name or name.endswith(".bias"):
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b|| in float64; 0 if both are zero."""
    a, b = a.double(), b.double()
    norm = b.norm().item()
    difference = (a - b).norm().item()
    return difference / norm if norm else difference


def loss_per_token(totals: Tensor) -> float:
    """Loss per token in nats, from ``run_batch`` on all ranks. Collective; waits for the device."""
    # All ranks of a tensor-parallel group add the same numbers, which cancels out in the quotient.
    dist.all_reduce(totals)
    total, tokens = totals.tolist()
    return total / tokens if tokens else math.nan
