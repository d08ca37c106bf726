"""Lengths and batch sizes of runs, compared with Megatron's calculator and with counting step by step."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_mesh.config.layout import batch_size_at, batch_sizes, last_sample, last_step
from megatron_mesh.config.schema import TrainingConfig


@st.composite
def ramps(draw: st.DrawFn) -> TrainingConfig:
    start, increment = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return TrainingConfig(
        global_batch_size=start + increment * draw(st.integers(1, 8)),
        train_samples=draw(st.integers(start, 2000)),
        rampup_batch_size=[start, increment, draw(st.integers(1, 900))],
    )


@given(ramps(), st.integers(0, 1000))
def test_batch_sizes_are_megatrons(training: TrainingConfig, consumed: int) -> None:
    assert training.rampup_batch_size and training.global_batch_size
    start, increment, samples = training.rampup_batch_size
    theirs = RampupBatchsizeNumMicroBatchesCalculator(
        training.global_batch_size, 1, 1, False, 1, start, increment, samples
    )
    theirs.update(consumed, consistency_check=True)
    assert batch_size_at(training, consumed) == theirs.get_current_global_batch_size()
    assert batch_size_at(training, consumed) in batch_sizes(training)


@given(ramps())
def test_the_last_step_is_where_counting_ends(training: TrainingConfig) -> None:
    """From every position in the run, and from its start."""
    assert training.train_samples is not None
    positions = [(0, 0)]
    while True:
        step, samples = positions[-1]
        if samples + batch_size_at(training, samples) > training.train_samples:
            break
        positions.append((step + 1, samples + batch_size_at(training, samples)))
    for step, samples in positions[:: max(1, len(positions) // 20)]:
        assert last_step(training, step, samples) == positions[-1][0]


def test_samples_count_whatever_the_batch_size() -> None:
    """400 samples: 200 of them in batches of 4, the rest in batches of 8 or 2."""

    def training(**changes: Any) -> TrainingConfig:
        return TrainingConfig(train_samples=400, **changes)

    assert last_step(training(global_batch_size=4)) == 100
    assert last_step(training(global_batch_size=8), 50, 200) == 75
    assert last_step(training(global_batch_size=2), 50, 200) == 150
    assert last_step(training(global_batch_size=3), 50, 200) == 116  # an incomplete batch is dropped
    assert last_step(training(global_batch_size=8), 110, 440) == 110
    assert last_sample(training(global_batch_size=8), 110, 440) == 440


def test_steps_count_whatever_the_batch_size() -> None:
    training = TrainingConfig(train_iters=10, global_batch_size=8)
    assert (last_step(training, 4, 99), last_sample(training, 4, 99)) == (10, 99 + 6 * 8)
