"""The settings of a benchmark: what is compared, at which shape, and for how long."""

from dataclasses import dataclass
from pathlib import Path

PLAIN = "plain"
"""The variant that is Megatron-core's GPT itself; every other one is a recurrence scheme by its name."""


@dataclass(frozen=True)
class Settings:
    """The default is the 160M shape of the paper with short sequences."""

    variants: tuple[str, ...] = (PLAIN, "base", "mesh")
    """plain (Megatron-core's GPT of the same depth) and recurrence schemes; each is set in relation to all
    those before it."""
    layers: str = "2+4R2+2"
    """Layers as prelude+coreRloops+coda; plain has as many as the unrolled depth."""
    hidden_size: int = 768
    """Hidden size H."""
    num_attention_heads: int = 12
    """Attention heads."""
    vocab_size: int = 50277
    """Entries of the vocabulary before padding."""
    seq_length: int = 128
    """Tokens per sequence S."""
    micro_batch_size: int = 1
    """Sequences per forward pass B."""
    num_micro_batches: int = 8
    """Micro-batches per step."""
    bf16: bool = False
    """Train in bfloat16, with main parameters and gradients in float32."""
    steps: int = 20
    """Measured steps of each variant."""
    warmup: int = 2
    """Steps of each variant before the measured ones."""
    seed: int = 1234
    """Seed of weights, data and the order of the variants."""
    threads: int | None = None
    """Threads of a CPU run; torch's choice if unset."""
    output: Path | None = None
    """Write everything measured to this JSON file."""
