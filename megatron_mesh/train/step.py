"""One training step over a global batch, and evaluation. Both run Megatron-core's pipeline schedules."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model
from torch import Tensor

from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.config.layout import batch_size_at, counts_samples
from megatron_mesh.config.schema import Config, TrainingConfig
from megatron_mesh.data import Batch, SampleStream
from megatron_mesh.errors import UserError
from megatron_mesh.parallel import Stage
from megatron_mesh.runtime import device, phases, profiling
from megatron_mesh.runtime.health import Health
from megatron_mesh.train.data import open_batches
from megatron_mesh.train.vote import Outcome, Vote, agree, agree_in_evaluation, clip

LossReport = tuple[Tensor, Tensor, Tensor]
"""What Megatron-core's schedules expect from a loss function: the sum to differentiate, the number of tokens
to divide the gradients by, and a report for the caller."""


def train_step(
    stage: Stage,
    optimizer: MegatronOptimizer,
    state: TrainState,
    batches: Iterator[Batch],
    training: TrainingConfig,
    *,
    vote: Callable[[], Vote] = Vote,
    beat: Callable[[], None] = lambda: None,
) -> Outcome:
    """Take one optimizer step over a global batch, or skip it if the loss or gradients are not finite.

    All ranks skip if one does. ``state`` advances in either case, so a skipped step uses up its samples and
    its place in the schedule. Collective. The host waits for the device only once, in ``agree``.

    Args:
        batches: this rank's micro-batches.
        training: resolved settings. Only the batch sizes and the unit of the schedule are used.
        vote: returns this rank's vote. Called after the forward and backward passes, so a signal that arrives
            during them still counts for this step.
        beat: called before every micro-batch, to show that this rank is making progress.
    """
    batch_size = batch_size_at(training, state.consumed_samples)
    with profiling.named("clear"):
        stage.zero_grad_buffer()
        optimizer.zero_grad()
    with profiling.named("forward-backward"):
        totals = run_batch(stage, batches, training, batch_size=batch_size, beat=beat)
    with profiling.named("agreement"):
        optimizer.prepare_grads()
        outcome = agree(optimizer, totals, vote())
    with profiling.named("update"):
        if outcome.taken:
            clip(optimizer, outcome.grad_norm)
            optimizer.step_with_ready_grads()
        state.skipped = 0 if outcome.taken else state.skipped + 1
        state.advance(batch_size, schedule_in_samples=counts_samples(training))
    return outcome


def masked_loss(loss_mask: Tensor, losses: Tensor) -> LossReport:
    """Sum the losses [B, S] whose mask [B, S] is 1. Return the sum, the number of tokens, and both as [2]."""
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    # The schedule scales the loss in place, so the report must not share its memory.
    return total, tokens.to(torch.int), torch.stack([total.detach(), tokens])


def forward_step(
    beat: Callable[[], None], batches: Iterator[Batch | None], chunk: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], LossReport] | None]:
    """Run the next micro-batch through a model chunk: the ``forward_step_func`` of the schedules.

    Args:
        beat: called first, to show that this rank is making progress.

    Returns:
        The losses [B, S] and the function that sums them. A chunk that does not hold the end of the model
        returns its hidden states instead.
    """
    beat()
    batch = next(batches)
    if batch is None:
        return chunk(None, None, attention_mask=None), None
    model = unwrap_model(chunk)
    # Benchmarks also run Megatron's own GPTModel, which has only the padded vocab_size.
    _check_ids(batch, getattr(model, "unpadded_vocab_size", model.vocab_size))
    inputs = {name: x.to(device.device(), non_blocking=True) for name, x in vars(batch).items()}
    inputs = get_batch_on_this_cp_rank(inputs)
    losses = chunk(inputs["tokens"], inputs["position_ids"], attention_mask=None, labels=inputs["labels"])
    return losses, partial(masked_loss, inputs["loss_mask"])


def _check_ids(batch: Batch, entries: int) -> None:
    """Raise UserError for an id outside the vocabulary, which would crash a kernel or corrupt the loss.

    The batch is still in host memory, so the check doesn't wait for the device.
    """
    largest = max(int(batch.tokens.max()), int(batch.labels.max()))
    if largest >= entries:
        raise UserError(
            f"the data contain token {largest}, but the model's vocabulary has {entries} entries; give "
            "the tokenizer that the data were made with (--tokenizer-model), or the right --vocab-size"
        )


def run_batch(
    stage: Stage,
    batches: Iterator[Batch],
    training: TrainingConfig,
    *,
    batch_size: int | None = None,
    forward_only: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> Tensor:
    """Run this rank's micro-batches of one global batch through Megatron-core's schedule.

    Unless ``forward_only``, ``main_grad`` then holds the gradients of the loss per token over all ranks.

    Args:
        batch_size: sequences in the global batch; by default ``global_batch_size``.

    Returns:
        [2], float64, on the device: this rank's sum of losses and number of tokens. Zeros on ranks that don't
        hold the end of the model.
    """
    batch_size = batch_size or training.global_batch_size
    assert batch_size is not None
    micro_batches = batch_size // parallel_state.get_data_parallel_world_size() // training.micro_batch_size
    stage.set_micro_batches(micro_batches)
    reports = get_forward_backward_func()(
        forward_step_func=partial(forward_step, beat),
        data_iterator=stage.data_for_chunks(batches),
        model=stage.chunks,
        num_microbatches=micro_batches,
        seq_length=stage.modules[0].max_sequence_length,
        micro_batch_size=training.micro_batch_size,
        forward_only=forward_only,
    )
    if not reports:
        return torch.zeros(2, dtype=torch.float64, device=device.device())
    return torch.stack(reports).double().sum(0)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation, equal on all ranks."""

    losses: dict[str, float]
    """Loss per token in nats, for each data set. Empty if the evaluation was interrupted."""
    stop: str = ""
    """Why the evaluation was interrupted (one of ``stopping.URGENT``), or ""."""


@torch.no_grad()
def evaluate(
    stage: Stage,
    config: Config,
    datasets: Mapping[str, SampleStream],
    health: Health,
    *,
    vote: Callable[[], Vote] = Vote,
    on_written: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure the loss over the first ``eval_iters`` global batches of each data set.

    Collective: one all-reduce per batch, for which the host waits.

    Args:
        datasets: data sets by name. A single one has the name "".
        vote: returns this rank's vote after each batch.
        on_written: a collective operation, called after a batch once all ranks have written their parts of
            the background checkpoint.
    """
    phases.enter("evaluation")
    losses: dict[str, float] = {}
    left, stop = len(datasets) * config.training.eval_iters, ""
    stage.train(False)
    with stage.parameters_gathered():
        for name, dataset in datasets.items():
            batches, loss, tokens = open_batches(config, dataset), 0.0, 0.0
            for index in range(config.training.eval_iters):
                health.beat(f"batch {index + 1} of an evaluation" + (f" on {name}" if name else ""))
                totals = run_batch(stage, batches, config.training, forward_only=True, beat=health.beat)
                interim = agree_in_evaluation(totals, vote())
                loss, tokens, left = loss + interim.loss, tokens + interim.tokens, left - 1
                if interim.all_written:
                    on_written()
                # After the last batch there is nothing to interrupt; the next step handles the request.
                stop = interim.stop if left else ""
                if stop:
                    break
            if stop:
                break
            losses[name] = loss / tokens if tokens else math.nan
    stage.train()
    return Evaluation({} if stop else losses, stop)
