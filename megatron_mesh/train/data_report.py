"""What a run's data consist of, in words. Nothing here reads data: the plans of the streams suffice."""

import logging
from collections import Counter
from collections.abc import Iterator

from megatron_mesh.config.schema import Config
from megatron_mesh.data import Datasets, SampleStream

logger = logging.getLogger(__name__)


def log_data(config: Config, data: Datasets, consumed_samples: int) -> None:
    """Say which sources the streams of a run take their samples from, and how often each is read."""
    lines = [
        line
        for name, stream in data.named().items()
        for line in describe(
            name, stream, config.model.seq_length, consumed_samples if name == "train" else 0
        )
    ]
    logger.info("\n".join(lines))


def describe(name: str, stream: SampleStream, seq_length: int, consumed_samples: int = 0) -> Iterator[str]:
    """Lines on one stream: its size, and for each source its share of the samples, tokens and epochs.

    A blend keeps to its weights within one sample, so the weights tell how many samples a source gives.

    Args:
        consumed_samples: where a run that resumes starts.
    """
    start = f", from sample {consumed_samples:,} on" if consumed_samples else ""
    tokens = len(stream) * seq_length
    yield f"{name} data: {len(stream):,} samples of {seq_length:,} tokens, {tokens:,} tokens{start}"
    for part in stream.parts:
        samples = len(part.dataset)
        epochs = f"{part.weight * len(stream) / samples:.3g} epochs"
        if consumed_samples:
            epochs += f" ({part.weight * consumed_samples / samples:.3g} of them done)"
        yield f"  {part.weight:6.2%} from {part.prefix}: {samples * seq_length:,} tokens, {epochs}"


def describe_sources(stream: SampleStream, samples: range) -> str:
    """Which sources some samples come from, e.g. ``3 of data/books (epoch 1), 1 of data/code (epoch 2)``."""
    origins = [stream.origin(sample) for sample in samples]
    counts = Counter((origin.prefix, origin.epoch + 1) for origin in origins)
    return ", ".join(f"{count} of {prefix} (epoch {epoch})" for (prefix, epoch), count in counts.items())
