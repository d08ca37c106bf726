"""How long a run is and how large its batches are. ``training`` is resolved everywhere.

A run of ``train_iters`` counts steps. A run of ``train_samples`` counts samples, so its number of steps
depends on the batch sizes on the way: those of a ramp-up, and those before and after a resume.
"""

from megatron_mesh.config.schema import TrainingConfig


def counts_samples(training: TrainingConfig) -> bool:
    """Whether length and schedule are in samples; otherwise they are in steps."""
    return training.train_samples is not None


def batch_size_at(training: TrainingConfig, consumed_samples: int) -> int:
    """Sequences of the global batch that begins after ``consumed_samples``.

    With ``rampup_batch_size`` this follows Megatron-LM (``megatron/core/num_microbatches_calculator.py``):
    the batch starts at START and grows by INCREMENT, in equal shares of SAMPLES, up to ``global_batch_size``.
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
    """All sizes that a global batch has in a run, ascending."""
    assert training.global_batch_size is not None
    if not training.rampup_batch_size:
        return [training.global_batch_size]
    start, increment, _ = training.rampup_batch_size
    return list(range(start, training.global_batch_size + 1, increment))


def last_step(training: TrainingConfig, step: int = 0, consumed_samples: int = 0) -> int:
    """The step at which a run ends that has done ``step`` steps over ``consumed_samples`` samples.

    An incomplete batch at the end of ``train_samples`` is left out, as in Megatron-LM.
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
    """The number of samples after which such a run ends, or at most ``global_batch_size - 1`` more."""
    if training.train_samples is not None:
        return max(training.train_samples, consumed_samples)
    assert training.train_iters is not None and training.global_batch_size is not None
    return consumed_samples + max(0, training.train_iters - step) * training.global_batch_size
