"""The layer layout of a model, written as ``4+8R2+4``, ``4+8+8+4`` or ``24``.

Numbers that follow from a resolved configuration.

The length of a run and the size of its batches, from resolved settings.

A run of ``train_iters`` counts steps. A run of ``train_samples`` counts samples, so its number of steps
depends on the batch sizes during a ramp-up, and before and after the run resumes.
"""

import re
from dataclasses import dataclass, replace

from megatron_mesh.config.schema import Config, ModelConfig, TrainingConfig
from megatron_mesh.errors import UserError

_SHARED = re.compile(r"(\d+)\+(\d+)R(\d+)\+(\d+)")
_DISTINCT = re.compile(r"\d+(\+\d+)*")


@dataclass(frozen=True)
class LayerLayout:
    """Layers of each section of a model, in the order in which a token passes through them.

    If ``shared``, every loop runs the same core weights (written ``p+cRK+q``). Otherwise every layer has
    separate weights.
    """

    prelude: int
    core: int
    loops: int
    coda: int
    shared: bool = True

    @property
    def depth(self) -> int:
        """Unrolled depth: layers that a token passes through, as in a plain model of equal compute."""
        return self.prelude + self.core * self.loops + self.coda

    @property
    def unique_layers(self) -> int:
        """Layers of weights."""
        return self.prelude + self.core * (1 if self.shared else self.loops) + self.coda

    @property
    def plain(self) -> bool:
        """Whether the layout is only a depth, without sections."""
        return not self.shared and (self.prelude, self.loops, self.coda) == (0, 1, 0)

    def distinct(self) -> "LayerLayout":
        """Return the same parts with separate weights for each loop: 4+8R2+4 becomes 4+8+8+4."""
        return replace(self, shared=False)

    def unrolled(self) -> "LayerLayout":
        """Return the plain model of the same depth: 4+8R2+4 becomes 24."""
        return LayerLayout(prelude=0, core=self.depth, loops=1, coda=0, shared=False)

    def __str__(self) -> str:
        if self.shared:
            return f"{self.prelude}+{self.core}R{self.loops}+{self.coda}"
        if self.plain:
            return str(self.core)
        return "+".join(str(n) for n in (self.prelude, *[self.core] * self.loops, self.coda))


def parse_layers(text: str) -> LayerLayout:
    """Parse ``p+cRK+q`` (shared core), ``p+c+...+c+q`` (separate cores) or a plain depth.

    Raises:
        UserError: the text has none of these forms, or a number is out of range.
    """
    text = text.strip()
    if match := _SHARED.fullmatch(text):
        prelude, core, loops, coda = map(int, match.groups())
        layout = LayerLayout(prelude, core, loops, coda)
    elif _DISTINCT.fullmatch(text):
        layout = _parse_distinct(text)
    else:
        raise UserError(
            f"--layers {text!r} is not a layer layout; write prelude+coreRloops+coda, e.g. 4+8R2+4 (a core "
            "of 8 layers that runs twice), 4+8+8+4 (separate cores) or 24 (a plain model)"
        )
    check_layout(layout)
    return layout


def _parse_distinct(text: str) -> LayerLayout:
    parts = [int(n) for n in text.split("+")]
    if len(parts) == 1:
        return LayerLayout(prelude=0, core=parts[0], loops=1, coda=0, shared=False)
    if len(parts) == 2:
        raise UserError(
            f"--layers {text} has two numbers; write prelude+core+coda, with 0 for an absent prelude or coda"
        )
    prelude, *cores, coda = parts
    if len(set(cores)) != 1:
        raise UserError(
            f"--layers {text} has cores of different sizes {cores}; give every core the same number of "
            f"layers, e.g. {prelude}+{cores[0]}+{cores[0]}+{coda}"
        )
    return LayerLayout(prelude, cores[0], len(cores), coda, shared=False)


def check_layout(layout: LayerLayout) -> None:
    """Raise UserError unless the core has layers and runs at least once."""
    if layout.loops < 1:
        raise UserError(
            f"the core of {layout} runs {layout.loops} times; --num-loops must be at least 1 (for a model "
            "without a loop use --recurrence vanilla)"
        )
    if layout.core < 1:
        raise UserError(
            f"the core of {layout} has no layers; --core-layers must be at least 1 (for a model without a "
            "loop use --recurrence vanilla --layers DEPTH)"
        )
    if layout.prelude < 0 or layout.coda < 0:
        raise UserError(
            f"the layers {layout} include a negative number; prelude and coda need 0 or more layers"
        )


def layout(model: ModelConfig) -> LayerLayout:
    """Return the layer layout of a resolved model."""
    assert model.layers is not None, "resolve() fills in layers"
    return parse_layers(model.layers)


def padded_vocab_size(model: ModelConfig) -> int:
    """Return the vocabulary size rounded up to a multiple of ``make_vocab_size_divisible_by``.

    Unlike Megatron-LM's padding, it doesn't depend on tensor parallelism, so a checkpoint fits every rank
    layout.

    Raises:
        UserError: the vocabulary size isn't known.
    """
    if model.vocab_size is None:
        raise UserError("the vocabulary size is not known; give --tokenizer-model or --vocab-size")
    multiple = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // multiple) * multiple


def tokens_of_rank(config: Config) -> int:
    """Return the tokens of a micro-batch that one context-parallel rank processes."""
    tokens = config.training.micro_batch_size * config.model.seq_length
    return tokens // config.parallel.context_parallel_size


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
