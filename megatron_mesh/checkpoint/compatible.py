"""Decides whether a run can resume from a checkpoint, and describes what changes for it.

``config/resuming.py`` says which settings may change, and what a change means.
"""

from collections.abc import Iterable, Mapping

from megatron_mesh.checkpoint.directory import Checkpoint
from megatron_mesh.config.layout import counts_samples
from megatron_mesh.config.resuming import ADAM, RESUMING, Kind, differing
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import flag, flatten
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.run_files import CONFIG_FILE


def check_same_run(checkpoint: Checkpoint, config: Config) -> None:
    """Raise UserError with the settings that differ if ``config`` cannot resume from ``checkpoint``."""
    settings, saved = config.checkpoint, checkpoint.config
    where = f"the checkpoint {checkpoint.path}"
    weights = differing(saved, config, Kind.WEIGHTS)
    if settings.finetune and "seq_length" in weights:
        weights.remove("seq_length")
    if weights:
        raise UserError(
            f"{where} is for a different model: {_in_words(saved, config, weights)}; use the checkpoint's "
            f"settings (--config {checkpoint.path / CONFIG_FILE}) or --load another checkpoint"
        )
    if settings.finetune or not settings.load_optim:
        return
    if checkpoint.weights_only:
        raise UserError(
            f"{where} holds only weights; add --finetune to start a new run from them, or --no-load-optim "
            "--no-load-rng to resume at its step with a new optimizer"
        )
    if names := differing(saved, config, Kind.OPTIMIZER):
        raise UserError(
            f"{where} has an optimizer state of another precision: {_in_words(saved, config, names)}; use "
            "the checkpoint's precision, or add --no-load-optim to start with a new optimizer"
        )
    schedule = _schedule_differences(saved, config)
    if schedule and not settings.override_opt_param_scheduler:
        raise UserError(
            f"{where} has another learning-rate schedule: {schedule}; use the checkpoint's settings, or add "
            "--override-opt-param-scheduler to resume with the new schedule"
        )


def schedule_position(checkpoint: Checkpoint, config: Config) -> int:
    """Return the position in the schedule of ``config`` at which the run resumes, in steps or samples."""
    state = checkpoint.train_state
    position = int(state["schedule"]["num_steps"])
    before, now = counts_samples(checkpoint.config.training), counts_samples(config.training)
    if before == now or not state["step"]:
        return position
    # After --no-load-optim the schedule is behind the run, so convert by the ratio, not from the step.
    steps_or_samples = (state["step"], state["consumed_samples"])
    return round(position / steps_or_samples[before] * steps_or_samples[now])


def describe_changes(checkpoint: Checkpoint, config: Config, fingerprints: Mapping[str, str]) -> list[str]:
    """Describe, in one sentence each, what changes when a run with ``config`` resumes from the checkpoint.

    Args:
        fingerprints: digests of this run's data and tokenizer (``TrainState.fingerprints``).

    Raises:
        UserError: training data or tokenizer differ, and ``require_same_data`` forbids that.
    """
    settings, saved = config.checkpoint, checkpoint.config
    if settings.finetune:
        return []  # a new run, which loads only the weights
    lines = _data_lines(checkpoint, config, fingerprints)
    by_meaning: dict[str, list[str]] = {}
    for name in differing(saved, config, Kind.REPORTED):
        if settings.load_optim or name not in ADAM:
            by_meaning.setdefault(RESUMING[name].consequence, []).append(name)
    lines += [f"{_in_words(saved, config, names)}: {meaning}" for meaning, names in by_meaning.items()]
    schedule = _schedule_differences(saved, config)
    if not settings.load_optim:
        precision = _in_words(saved, config, differing(saved, config, Kind.OPTIMIZER))
        also = f" ({'; '.join(filter(None, (precision, schedule)))})" if precision or schedule else ""
        lines.append(
            f"--no-load-optim: at step {checkpoint.train_state['step']} of the run, Adam's moments restart "
            f"at zero and the learning-rate schedule restarts at its beginning{also}"
        )
    elif schedule:
        lines.append(
            f"{schedule}: the new schedule applies from this step on, at the position that it would have "
            "reached by now"
        )
    if not settings.load_rng:
        lines.append("--no-load-rng: the random number generators restart from --seed")
    return lines


def _data_lines(checkpoint: Checkpoint, config: Config, now: Mapping[str, str]) -> list[str]:
    """Describe the changes in training data, tokenizer, and validation and test data."""
    before = checkpoint.train_state.get("fingerprints")
    saved, strict = checkpoint.config, config.checkpoint.require_same_data
    lines, refused = [], []
    sample = checkpoint.train_state["consumed_samples"]
    words = _in_words(saved, config, differing(saved, config, Kind.ORDER))
    if before is None and not words:
        refused.append(
            f"{checkpoint.path} is from an earlier version, which didn't record its training data: the data "
            "are assumed to be the same"
        )
    elif before is None or before["train"] != now["train"]:
        refused.append(
            f"{words or 'the training data have changed since the checkpoint'}: the samples now come in a "
            f"different order; training resumes at sample {sample:,} of the new order"
        )
    elif words:
        lines.append(f"{words}: the samples and their order are the same")
    words = _in_words(saved, config, differing(saved, config, Kind.TOKENIZER))
    theirs, ours = (before or {}).get("tokenizer"), now.get("tokenizer")
    if theirs != ours if theirs and ours else words:
        refused.append(
            f"{words or 'the tokenizer has changed since the checkpoint'}: the data still hold the ids of "
            "the tokenizer that made them; the new one only sets vocabulary size and end-of-document id"
        )
    if strict and refused:
        raise UserError(
            f"{'; '.join(refused)}; use the checkpoint's data, seed and tokenizer, or leave out "
            "--require-same-data"
        )
    return refused + lines + _validation_lines(saved, config, before, now)


def _validation_lines(
    saved: Config, config: Config, before: Mapping[str, str] | None, now: Mapping[str, str]
) -> list[str]:
    words = _in_words(saved, config, differing(saved, config, Kind.VALIDATION))
    if before is not None:
        ours, theirs = (
            {name for name in each if name.startswith(("valid", "test"))} for each in (now, before)
        )
        if not ours or not theirs or all(before.get(name) == now.get(name) for name in ours | theirs):
            return []
    elif not words:
        return []
    return [
        f"{words or 'the validation or test data have changed'}: their losses are not comparable with "
        "those before this step"
    ]


def _schedule_differences(saved: Config, ours: Config) -> str:
    """Describe the schedule settings that differ. A length in steps is compared with one in samples, too."""
    names = differing(saved, ours, Kind.SCHEDULE)
    before, now = (counts_samples(config.training) for config in (saved, ours))
    if before == now:
        return _in_words(saved, ours, names)
    same_unit = [name for name in names if not name.endswith(("_iters", "_samples"))]
    lengths = [
        f"--{name}-{_unit(saved)} was {a} in the checkpoint and --{name}-{_unit(ours)} is {b} now"
        for name in ("lr-decay", "lr-warmup", "lr-wsd-decay")
        if (a := _length(saved, name)) is not None
        if (b := _length(ours, name)) is not None
        # Earlier versions rounded samples down to steps, twice for the warm-up, so allow that much.
        if abs(a * (1 if before else _batch(saved)) - b * (1 if now else _batch(ours)))
        >= 2 * (_batch(ours) if before else _batch(saved))
    ]
    return ", ".join(filter(None, (_in_words(saved, ours, same_unit), *lengths)))


def _unit(config: Config) -> str:
    return "samples" if counts_samples(config.training) else "iters"


def _length(config: Config, name: str) -> int | None:
    return getattr(config.optimizer, f"{name.replace('-', '_')}_{_unit(config)}")


def _batch(config: Config) -> int:
    assert config.training.global_batch_size is not None
    return config.training.global_batch_size


def _in_words(saved: Config, ours: Config, names: Iterable[str]) -> str:
    before, now = flatten(saved), flatten(ours)
    return ", ".join(
        f"{flag(name)} was {_text(before[name])} in the checkpoint and is {_text(now[name])} now"
        for name in names
    )


def _text(value: object) -> str:
    """Return a value as one writes it on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "unset" if value is None else str(value)
