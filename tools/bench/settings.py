"""The settings of a benchmark: what is compared, at which shape, and for how long."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_mesh.bench.shapes import PLAIN, SHAPES, ShapeName

EagerAttention = Literal["sdpa", "eager"]
"""Transformers' names of attention by ``scaled_dot_product_attention`` and with the scores written out."""


@dataclass(frozen=True)
class Settings:
    """What is not given follows from the shape and from whether there is a GPU (``complete``)."""

    variants: tuple[str, ...] | None = None
    """plain (Megatron-core's GPT of the same depth), eager (a loop of Hugging Face layers) and recurrence
    schemes; with the ending -fp8 or -compiled, in FP8 or through torch.compile, e.g. mesh-fp8. Each is set in
    relation to those before it. Unset: those of the shape; plain base mesh on a CPU."""
    shape: ShapeName | None = None
    """Layers, widths and, on a GPU, the micro-batch. Unset: 410m on a GPU, 160m on a CPU."""
    layers: str | None = None
    """Layers as prelude+coreRloops+coda instead of the shape's; plain has as many as the unrolled depth."""
    hidden_size: int | None = None
    """Hidden size H instead of the shape's."""
    num_attention_heads: int | None = None
    """Attention heads instead of the shape's."""
    vocab_size: int = 50277
    """Entries of the vocabulary before padding."""
    seq_length: int | None = None
    """Tokens per sequence S. Unset: 2048 on a GPU, 128 on a CPU."""
    micro_batch_size: int | None = None
    """Sequences per forward pass B. Unset: the shape's on a GPU, 1 on a CPU."""
    num_micro_batches: int = 8
    """Micro-batches per step."""
    bf16: bool | None = None
    """Train in bfloat16, with main parameters and gradients in float32 (eager: autocast). Unset: on a GPU."""
    fp8_recipe: Literal["tensorwise", "blockwise", "delayed"] = "tensorwise"
    """Scales of the variants in FP8."""
    fp8_scope: Literal["core", "all"] = "core"
    """Layers in FP8 of these variants: the core's, or prelude's and coda's too; of plain models all."""
    eager_attention: EagerAttention = "sdpa"
    """Attention of eager: transformers' default, or with the scores written out."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to the float32 ones inside the matrix product (Transformer Engine or apex)."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Recompute attention (selective) or whole layers (full) in the backward pass; not for eager."""
    steps: int = 20
    """Measured steps of each variant."""
    warmup: int = 2
    """Steps of each variant before the measured ones."""
    seed: int = 1234
    """Seed of weights, data and the order of the variants."""
    threads: int | None = None
    """Threads of a CPU run; torch's choice if unset."""
    nvtx: bool = False
    """Mark passes and cycles with NVTX ranges in every step, for Nsight Systems."""
    profile: Path | None = None
    """Write a trace of one more step of each variant into this directory (for ui.perfetto.dev)."""
    output: Path | None = None
    """Write everything measured to this JSON file, and the tables beside it as Markdown (.md); results of an
    earlier run are replaced."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all micro-batches; of complete settings."""
        assert self.micro_batch_size is not None and self.seq_length is not None
        return self.num_micro_batches * self.micro_batch_size * self.seq_length


def complete(settings: Settings, gpu: bool) -> Settings:
    """``settings`` with everything filled in that was left to the shape and the machine."""
    name: ShapeName = settings.shape or ("410m" if gpu else "160m")
    shape = SHAPES[name]
    chosen: dict[str, Any] = {
        "shape": name,
        "variants": shape.variants if gpu else (PLAIN, "base", "mesh"),
        "layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "seq_length": 2048 if gpu else 128,
        "micro_batch_size": shape.micro_batch_size if gpu else 1,
        "bf16": gpu,
    }
    return replace(settings, **{key: v for key, v in chosen.items() if getattr(settings, key) is None})
