"""The training loop: from a resolved configuration to the last checkpoint.

``pretrain`` builds the run, resumes it if there is a checkpoint, and calls ``train``. That takes one step
after another (``step.py``), logs, saves and evaluates when they are due, and stops when all ranks have agreed
to (``vote.py``).
"""

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from megatron_mesh.checkpoint.compatible import check_same_run, describe_changes
from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.checkpoint.directory import saved_steps
from megatron_mesh.checkpoint.load import Found, Search, load_checkpoint
from megatron_mesh.checkpoint.save import Saved, Saver, Unsaved
from megatron_mesh.config.layout import batch_size_at, last_step
from megatron_mesh.config.schema import Config
from megatron_mesh.data import Datasets
from megatron_mesh.metrics.log import Log, check_trackers
from megatron_mesh.metrics.meters import RouterMeter, SpeedMeter, perplexity
from megatron_mesh.model.implementation import choose
from megatron_mesh.parallel import Stage, build_stage
from megatron_mesh.runtime import exits, phases
from megatron_mesh.runtime.distributed import is_rank_zero, process_groups
from megatron_mesh.runtime.failures import explain_out_of_memory, remedies
from megatron_mesh.runtime.health import Health
from megatron_mesh.runtime.ownership import owned
from megatron_mesh.runtime.phases import STARTED
from megatron_mesh.runtime.stopping import URGENT, StopRequests, write_status
from megatron_mesh.train.data import (
    describe_sources,
    fingerprints_of,
    log_data,
    open_batches,
    open_datasets,
    open_vocabulary,
)
from megatron_mesh.train.optimizer import build_optimizer, build_schedule, warn_if_lr_reaches_zero_early
from megatron_mesh.train.output import (
    check_writable,
    open_outputs,
    position,
    run_summary,
    warn_if_nothing_is_saved,
)
from megatron_mesh.train.step import evaluate, train_step
from megatron_mesh.train.vote import Outcome, Vote

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that training uses, built and, if the run resumes, loaded from a checkpoint."""

    config: Config
    data: Datasets
    stage: Stage
    optimizer: MegatronOptimizer
    state: TrainState


def pretrain(config: Config) -> int:
    """Train with a resolved ``config``; return an exit status (``runtime/exits.py``).

    Raises:
        UserError: the input is bad. Nothing has been written by then.
        OutOfMemory: the device memory does not suffice. The message names settings that help.
    """
    started = time.monotonic()
    choose(config.precision, config.parallel)
    with (
        process_groups(config) as health,
        explain_out_of_memory(partial(remedies, config)),
        owned(config.checkpoint.save, health),
    ):
        if is_rank_zero():
            warn_if_lr_reaches_zero_early(config)
            warn_if_nothing_is_saved(config)
        with health.busy("the start"):
            check_trackers(config.logging)
            phases.enter("loading a checkpoint")
            search = Search(config.checkpoint)
            check_writable(config)
            run = build_run(config, search)
            if is_rank_zero():
                log_data(run.config, run.data, run.state.consumed_samples)
        stop = StopRequests(config.checkpoint, started)
        with open_outputs(run.config, run.state) as log, stop.listening():
            write_status(config.checkpoint.save, "running")
            health.failures.running = True
            ending = train(run, log, health, stop)
            phases.enter("the end")
            log.record("summary", run.state.step, **run_summary(run.config, run.state, log))
        if config.checkpoint.save is not None:
            write_status(config.checkpoint.save, STATUS[ending])
    return ending


STATUS = {exits.DONE: "done", exits.STOPPED: "stopped", exits.NOT_SAVED: "failed", exits.DIVERGED: "failed"}
"""The word in ``run_status.txt`` for each exit status of a run with --save."""


def build_run(config: Config, search: Search | None = None) -> Run:
    """Open the data, build model, optimizer and schedule, and load the first intact checkpoint.

    Args:
        search: finds checkpoints to resume from; None starts a new run.
    """
    found = search.next() if search is not None else None
    phases.enter("data")
    config, tokenizer = open_vocabulary(config)
    start = start_position(config, found)
    data = open_datasets(config, tokenizer, *start)
    fingerprints = fingerprints_of(data, tokenizer)
    differences = describe_changes(found.checkpoint, config, fingerprints) if found else []
    phases.enter("model")
    stage = build_stage(config, initial_weights=found is None)
    optimizer = build_optimizer(config, stage)
    state = TrainState(build_schedule(config.optimizer, optimizer))
    while found is not None and (damage := load_checkpoint(found, config, stage, optimizer, state)):
        assert search is not None
        found = search.next(damage)
        if start != start_position(config, found):
            start = start_position(config, found)
            data = open_datasets(config, tokenizer, *start)
        differences = describe_changes(found.checkpoint, config, fingerprints) if found else []
    if is_rank_zero():
        for difference in differences:
            logger.warning("resuming: %s", difference)
    state.fingerprints = fingerprints
    return Run(config, data, stage, optimizer, state)


def start_position(config: Config, found: Found | None) -> tuple[int, int]:
    """Return the step and the number of consumed samples at which the run starts.

    Raises:
        UserError: a run with this configuration cannot resume from the checkpoint.
    """
    if found is None:
        return 0, 0
    check_same_run(found.checkpoint, config)
    return found.checkpoint.position(config)


def train(run: Run, log: Log, health: Health, stop: StopRequests) -> int:
    """Take steps until the run is complete or asked to stop; return an exit status (``runtime/exits.py``)."""
    config, stage, optimizer, state = run.config, run.stage, run.optimizer, run.state
    last = last_step(config.training, state.step, state.consumed_samples)
    batch_size = partial(batch_size_at, config.training)
    speed = SpeedMeter(config, state.step, state.consumed_samples)
    routers = RouterMeter(stage.recurrence, enabled=config.logging.log_routers)
    batches = open_batches(config, run.data.train, state.consumed_samples, batch_size)
    saver = open_saver(config, log, state.step)
    first, reason, saving = state.step + 1, "", config.checkpoint.save_timeout_minutes

    def vote() -> Vote:
        return Vote(stop.reason(state.step + 1), written=saver is None or saver.written())

    while state.step < last and not reason:
        step, before = state.step + 1, state.consumed_samples
        health.beat(f"step {step}")
        phases.enter("step")
        logged = step == 1 or due(step, config.logging.log_interval, last)
        lr = get_canonical_lr_for_logging(optimizer.param_groups)
        with routers.observing(logged):
            outcome = train_step(
                stage, optimizer, state, batches, config.training, vote=vote, beat=health.beat
            )
        reason = outcome.stop
        log.tick(step)
        if step == first:
            phases.enter(STARTED)

        if not outcome.taken:
            record_skipped(log, run, outcome, before)
        elif logged:
            state.train_loss, state.train_loss_step = outcome.loss, step
            numbers = {
                "loss": outcome.loss,
                "lr": lr,
                "grad_norm": outcome.grad_norm,
                **speed.read(step, state.consumed_samples),
            }
            log.record("train", step, **numbers, **position(config, state), **routers.read())
        if state.skipped >= config.training.max_skipped_steps:
            return diverged(config, state, saver, health)
        if saver is not None and saver.pending and outcome.all_written:
            with speed.paused(), health.busy(f"publishing a checkpoint after step {step}", saving):
                saver.complete()
        if saver is not None and (reason or due(step, config.checkpoint.save_interval, last)):
            with speed.paused():
                save(run, saver, health)
        in_a_hurry = reason in URGENT and step < last
        if run.data.validation and due(step, config.training.eval_interval, last) and not in_a_hurry:
            with speed.paused():
                interrupted = evaluate_and_log(run, "valid", log, health, stop, saver)
                if interrupted and saver is not None:
                    save(run, saver, health)
            reason = interrupted or reason
    return finish(run, log, health, stop, saver, reason)


def save(run: Run, saver: Saver, health: Health) -> None:
    """Save a checkpoint of the current step, unless there is one."""
    if not saver.has(run.state.step):
        with health.busy(f"the save after step {run.state.step}", run.config.checkpoint.save_timeout_minutes):
            saver.save(run.stage, run.optimizer, run.state)


def evaluate_and_log(
    run: Run,
    kind: Literal["valid", "test"],
    log: Log,
    health: Health,
    stop: StopRequests,
    saver: Saver | None,
) -> str:
    """Evaluate and log the loss. If a rank is asked to stop meanwhile, return the reason and log nothing.

    With several validation sets, each loss is logged, and their mean is the validation loss. If a checkpoint
    is being written in the background, it is published as soon as all ranks have written their parts.
    """
    state, data = run.state, run.data
    datasets = data.validation if kind == "valid" else {"": data.named()["test"]}

    def publish() -> None:
        if saver is not None and saver.pending:
            with health.busy("publishing a checkpoint", run.config.checkpoint.save_timeout_minutes):
                saver.complete()

    def vote() -> Vote:
        return Vote(stop.urgent(), written=saver is None or saver.written())

    ended = evaluate(run.stage, run.config, datasets, health, vote=vote, on_written=publish)
    if ended.stop:
        return ended.stop
    loss = fmean(ended.losses.values())
    sets = {"sets": ended.losses} if kind == "valid" and data.valid_sets else {}
    log.record(kind, state.step, loss=loss, perplexity=perplexity(loss), **sets)
    if kind == "valid":
        state.valid_loss, state.valid_loss_step = loss, state.step
        if saver is not None:
            saver.note_validation(state)
    return ""


def finish(run: Run, log: Log, health: Health, stop: StopRequests, saver: Saver | None, reason: str) -> int:
    """Finish the pending save and, unless the run was stopped, evaluate on the test data; return a status."""
    state, data = run.state, run.data
    if saver is not None:
        finish_saving(saver, run.config, health)
        saver.note_validation(state)
    at_end = state.step == last_step(run.config.training, state.step, state.consumed_samples)
    if not reason and at_end and data.validation and state.valid_loss_step != state.step:
        reason = evaluate_and_log(
            run, "valid", log, health, stop, saver
        )  # an earlier start was stopped during it
    if not reason and data.test is not None:
        reason = evaluate_and_log(run, "test", log, health, stop, saver)
    if reason:
        nothing = "" if saver is not None else "; no checkpoint was saved, because there is no --save"
        logger.info("stopped after step %d: %s%s", state.step, reason, nothing)
        stop.remove_stop_file()
    if saver is not None and saver.failed:
        return exits.NOT_SAVED
    validated = not data.validation or state.valid_loss_step == state.step
    if not reason or (at_end and validated and data.test is None):
        return exits.DONE
    return exits.STOPPED if saver is not None else exits.STOPPED_UNSAVED


def finish_saving(saver: Saver, config: Config, health: Health) -> None:
    """Publish the pending checkpoint, if there is one, within the watchdog's limit for saves."""
    phases.enter("the last save")
    with health.busy("the last save", config.checkpoint.save_timeout_minutes):
        saver.finish()


def open_saver(config: Config, log: Log, loaded_step: int) -> Saver | None:
    """Return the run's ``Saver``, which logs every save; None without --save."""
    if config.checkpoint.save is None:
        return None
    grace = config.checkpoint.exit_grace_seconds

    def on_saved(saved: Saved) -> None:
        seconds = {"seconds": saved.seconds, "stall_seconds": saved.stall_seconds}
        log.record("save", saved.step, path=str(saved.path), **seconds)
        if grace is not None and saved.seconds > grace and is_rank_zero():
            logger.warning(
                "saving took %.0f s, longer than --exit-grace-seconds %.0f: a job that is asked to stop may "
                "be killed before its checkpoint is complete; raise the job's grace time and this setting",
                saved.seconds,
                grace,
            )

    def on_failed(unsaved: Unsaved) -> None:
        log.record("save_failed", unsaved.step, reason=unsaved.reason, steps_at_risk=unsaved.steps_at_risk)

    return Saver(config, on_saved, on_failed, loaded_step)


def record_skipped(log: Log, run: Run, outcome: Outcome, first_sample: int) -> None:
    """Log a skipped step and its samples. Call this after the state has advanced."""
    end = run.state.consumed_samples
    samples: dict[str, Any] = {"first_sample": first_sample, "last_sample": end - 1}
    if is_rank_zero():
        samples["sources"] = describe_sources(run.data.train, range(first_sample, end))
    log.record("skipped", run.state.step, loss=outcome.loss, grad_norm=outcome.grad_norm, **samples)


def diverged(config: Config, state: TrainState, saver: Saver | None, health: Health) -> int:
    """End the run after too many skipped steps in a row, and log which checkpoint to resume from."""
    if saver is not None:
        finish_saving(saver, config, health)  # it may be the last good one
    if is_rank_zero():
        logger.error(
            "stopped: %d steps in a row had a NaN or infinite loss or gradients (--max-skipped-steps); the "
            "last good checkpoint: %s; resume from it with a lower --lr, or without the samples logged above",
            state.skipped,
            last_good_checkpoint(config, state),
        )
    return exits.DIVERGED


def last_good_checkpoint(config: Config, state: TrainState) -> Path | str:
    """Return the newest checkpoint before the skipped steps, "none", or "unknown" with the disk's error."""
    if config.checkpoint.save is None:
        return "none"
    try:
        steps = saved_steps(Path(config.checkpoint.save))
    except OSError as error:  # must not hide the message that the run diverged
        return f"unknown ({error})"
    good = [path for step, path in steps.items() if step <= state.step - state.skipped]
    return good[-1] if good else "none"


def due(step: int, interval: int | None, last: int) -> bool:
    """Return whether ``step`` is a multiple of ``interval`` (None and 0: never) or the last step."""
    return step == last or bool(interval and step % interval == 0)
