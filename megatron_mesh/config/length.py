"""The length of a run and the size of its batches, from resolved settings.

A run of ``train_iters`` counts steps. A run of ``train_samples`` counts samples, so its number of steps
depends on the batch sizes during a ramp-up, and before and after the run resumes.
"""

from megatron_mesh.config.schema import TrainingConfig


def counts_samples(training: TrainingConfig) -> bool:
    """Return whether the run's length and schedule count samples instead of steps."""
    return training.train_samples is not None


def batch_size_at(training: TrainingConfig, consumed_samples: int) -> int:
    """Return the size of the global batch after ``consumed_samples`` samples.

    With ``rampup_batch_size`` it follows Megatron-LM (``megatron/core/num_microbatches_calculator.py``): it
    starts at START and grows by INCREMENT in equal shares of SAMPLES, up to ``global_batch_size``.
    """
    assert training.global_batch_size is not None
    if not training.rampup_batch_size:
        return training.global_batch_size
    start, increment, samples = training.rampup_batch_size
    if consumed_samples > samples:
        return training.global_batch_size
    increments = (training.global_batch_size - start) // increment
    return start + int(consumed_samples / (samples / increments)) * increment


def batch_sizes(training: TrainingConfig) -> list[int]:
    """Return all global batch sizes of a run, in ascending order."""
    assert training.global_batch_size is not None
    if not training.rampup_batch_size:
        return [training.global_batch_size]
    start, increment, _ = training.rampup_batch_size
    return list(range(start, training.global_batch_size + 1, increment))


def last_step(training: TrainingConfig, step: int = 0, consumed_samples: int = 0) -> int:
    """Return the last step of a run that has done ``step`` steps with ``consumed_samples`` samples.

    An incomplete batch at the end of ``train_samples`` is dropped, as in Megatron-LM.
    """
    if training.train_samples is None:
        assert training.train_iters is not None
        return training.train_iters
    largest = batch_sizes(training)[-1]
    while (size := batch_size_at(training, consumed_samples)) < largest:
        if consumed_samples + size > training.train_samples:
            return step
        step, consumed_samples = step + 1, consumed_samples + size
    return step + max(0, training.train_samples - consumed_samples) // largest


def last_sample(training: TrainingConfig, step: int = 0, consumed_samples: int = 0) -> int:
    """Return the number of samples after which such a run ends. It may end up to one batch earlier."""
    if training.train_samples is not None:
        return max(training.train_samples, consumed_samples)
    assert training.train_iters is not None and training.global_batch_size is not None
    return consumed_samples + max(0, training.train_iters - step) * training.global_batch_size
