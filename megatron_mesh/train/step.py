"""A global batch through Megatron-core's schedule: its loss, and its gradients."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model
from torch import Tensor

from megatron_mesh.config.schema import Config, TrainingConfig
from megatron_mesh.data import Batch, SampleStream
from megatron_mesh.errors import UserError
from megatron_mesh.parallel import Stage
from megatron_mesh.runtime import device
from megatron_mesh.runtime.health import Health
from megatron_mesh.train.data import open_batches

# What the schedules take from a loss function: the sum to differentiate, the number of tokens to divide
# the gradients by, and a report that they collect.
LossReport = tuple[Tensor, Tensor, Tensor]


def masked_loss(loss_mask: Tensor, losses: Tensor) -> LossReport:
    """Sum of those losses [B, S] whose mask [B, S] is 1, their number, and both again as a report [2]."""
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    # The schedule scales the loss in place; the report has memory of its own.
    return total, tokens.to(torch.int), torch.stack([total.detach(), tokens])


def forward_step(
    beat: Callable[[], None], batches: Iterator[Batch | None], chunk: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], LossReport] | None]:
    """The schedules' ``forward_step_func``: run the next micro-batch through a chunk of the model.

    Args:
        beat: called to say that the rank goes on.

    Returns:
        Losses [B, S] and how to sum them; from a chunk that does not end the model, what it hands on.
    """
    beat()
    batch = next(batches)
    if batch is None:
        return chunk(None, None, attention_mask=None), None
    model = unwrap_model(chunk)
    _check_ids(batch, getattr(model, "entries", model.vocab_size))  # Megatron's own GPTModel, in benchmarks
    there = {name: x.to(device.device(), non_blocking=True) for name, x in vars(batch).items()}
    there = get_batch_on_this_cp_rank(there)
    losses = chunk(there["tokens"], there["position_ids"], attention_mask=None, labels=there["labels"])
    return losses, partial(masked_loss, there["loss_mask"])


def _check_ids(batch: Batch, entries: int) -> None:
    """Raise UserError for an id outside the vocabulary, which would crash deep inside or spoil the loss."""
    largest = max(int(batch.tokens.max()), int(batch.labels.max()))
    if largest >= entries:
        raise UserError(
            f"the data hold token {largest}, and the model's vocabulary has {entries} entries; give "
            "the tokenizer that the data were made with (--tokenizer-model), or the right --vocab-size"
        )


def run_batch(
    stage: Stage,
    batches: Iterator[Batch],
    training: TrainingConfig,
    *,
    forward_only: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> Tensor:
    """Run this rank's micro-batches of one global batch.

    Unless ``forward_only``, the gradients of the loss per token, over all ranks, are in ``main_grad`` then.

    Returns:
        [2], float64: the sum of the losses and the number of tokens in it, where the model ends; else 0.
    """
    assert training.global_batch_size is not None
    share = training.global_batch_size // parallel_state.get_data_parallel_world_size()
    reports = get_forward_backward_func()(
        forward_step_func=partial(forward_step, beat),
        data_iterator=stage.data_for_chunks(batches),
        model=stage.chunks,
        num_microbatches=share // training.micro_batch_size,
        seq_length=stage.modules[0].max_sequence_length,
        micro_batch_size=training.micro_batch_size,
        forward_only=forward_only,
    )
    if not reports:
        return torch.zeros(2, dtype=torch.float64, device=device.device())
    return torch.stack(reports).double().sum(0)


def loss_per_token(totals: Tensor) -> float:
    """Loss per token in nats, from every rank's ``run_batch``; a collective operation."""
    # All ranks of a tensor-parallel group add the same numbers, which the quotient does not see.
    dist.all_reduce(totals)
    total, tokens = totals.tolist()
    return total / tokens if tokens else math.nan


@torch.no_grad()
def evaluate(stage: Stage, config: Config, dataset: SampleStream, health: Health) -> float:
    """Loss per token in nats over the first ``eval_iters`` global batches of ``dataset``."""
    batches = open_batches(config, dataset)
    totals = []
    stage.train(False)
    with stage.parameters_gathered():
        for index in range(config.training.eval_iters):
            health.beat(f"batch {index + 1} of an evaluation")
            totals.append(run_batch(stage, batches, config.training, forward_only=True, beat=health.beat))
    stage.train()
    return loss_per_token(torch.stack(totals).sum(0))
