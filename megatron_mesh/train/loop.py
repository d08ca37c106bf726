"""Pretraining, from resolved settings to the last checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from megatron_mesh.config.schema import Config
from megatron_mesh.data import Datasets
from megatron_mesh.errors import UserError
from megatron_mesh.parallel import Stage, build_stage
from megatron_mesh.runtime.distributed import process_groups
from megatron_mesh.runtime.health import Health
from megatron_mesh.runtime.logging import Log, check_trackers
from megatron_mesh.train.checkpoint import load_checkpoint, save_checkpoint
from megatron_mesh.train.data import open_batches, open_datasets, open_vocabulary
from megatron_mesh.train.metrics import RouterMeter, SpeedMeter, perplexity
from megatron_mesh.train.optimizer import build_optimizer, build_schedule
from megatron_mesh.train.output import check_writable, open_outputs, summary
from megatron_mesh.train.resume import Checkpoint, check_same_run, find_checkpoint
from megatron_mesh.train.state import TrainState
from megatron_mesh.train.step import evaluate, loss_per_token, run_batch


@dataclass
class Run:
    """The parts of a run, built and, if it resumes, loaded."""

    config: Config
    data: Datasets
    stage: Stage
    optimizer: MegatronOptimizer
    state: TrainState


def pretrain(config: Config) -> TrainState:
    """Train as ``config`` (resolved) says; returns where the run ended.

    Raises:
        UserError: bad input, before anything is written.
    """
    check_trackers(config.logging)
    checkpoint = find_checkpoint(config.checkpoint)
    check_writable(config)
    with process_groups(config) as health:
        run = build(config, checkpoint)
        with open_outputs(run.config, run.state) as log:
            train(run, log, health)
            log.record("summary", run.state.step, **summary(run.config, run.state, log))
    return run.state


def build(config: Config, checkpoint: Checkpoint | None) -> Run:
    """Open the data, build model, optimizer and schedule, and take over ``checkpoint``."""
    config, tokenizer = open_vocabulary(config)
    step, consumed_samples = 0, 0
    if checkpoint is not None:
        check_same_run(checkpoint, config)
        step, consumed_samples = checkpoint.position(config)
    data = open_datasets(config, tokenizer, step, consumed_samples)
    stage = build_stage(config)
    optimizer = build_optimizer(config, stage)
    override = config.checkpoint.override_opt_param_scheduler
    state = TrainState(build_schedule(config.optimizer, optimizer, override=override))
    if checkpoint is not None:
        load_checkpoint(checkpoint, config, stage, optimizer, state)
    return Run(config, data, stage, optimizer, state)


def train(run: Run, log: Log, health: Health) -> None:
    """The loop."""
    config, stage, optimizer, state = run.config, run.stage, run.optimizer, run.state
    last, batch_size = config.training.train_iters, config.training.global_batch_size
    assert last is not None and batch_size is not None
    speed = SpeedMeter(config, state.step)
    routers = RouterMeter(stage.recurrence, enabled=config.logging.log_routers)
    batches = open_batches(config, run.data.train, state.consumed_samples)

    while state.step < last:
        step = state.step + 1
        health.beat(f"step {step}")
        logged = step == 1 or due(step, config.logging.log_interval, last)
        stage.zero_grad_buffer()
        optimizer.zero_grad()
        with routers.observing(logged):
            totals = run_batch(stage, batches, config.training)
        lr = get_canonical_lr_for_logging(optimizer.param_groups)
        _, grad_norm, _ = optimizer.step()  # clips the gradients first
        check_finite(grad_norm, step)
        state.advance(batch_size)
        log.tick(step)

        if logged:
            state.train_loss = loss_per_token(totals)
            numbers = {"loss": state.train_loss, "lr": lr, "grad_norm": grad_norm}
            position = {
                "consumed_samples": state.consumed_samples,
                "consumed_tokens": state.consumed_samples * config.model.seq_length,
            }
            log.record("train", step, **numbers, **speed.read(step), **position, **routers.read())
        if run.data.valid is not None and due(step, config.training.eval_interval, last):
            with speed.paused():
                state.valid_loss = evaluate(stage, config, run.data.valid, health)
            log.record("valid", step, loss=state.valid_loss, perplexity=perplexity(state.valid_loss))
        if config.checkpoint.save and due(step, config.checkpoint.save_interval, last):
            with speed.paused():
                save_checkpoint(Path(config.checkpoint.save), config, stage, optimizer, state)

    if run.data.test is not None:
        loss = evaluate(stage, config, run.data.test, health)
        log.record("test", state.step, loss=loss, perplexity=perplexity(loss))


def check_finite(grad_norm: float, step: int) -> None:
    """Raise UserError, on all ranks alike, for a step that spoilt the weights: it must not be saved."""
    if not math.isfinite(grad_norm):
        raise UserError(
            f"the gradients of step {step} are not finite: the run diverged; lower --lr, lengthen the "
            "warm-up or set --clip-grad, and start anew or from an earlier checkpoint"
        )


def due(step: int, interval: int | None, last: int) -> bool:
    """Whether ``step`` ends a period of ``interval`` steps (None and 0: never) or the run."""
    return step == last or bool(interval and step % interval == 0)
