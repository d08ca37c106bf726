"""Settings of the step benchmark: which variants run, at which shape, and for how long."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES

PLAIN = "plain"
"""The variant that is Megatron-core's own GPT."""
EAGER = "eager"
"""The variant that loops over Hugging Face layers (``eager_loop.py``)."""
FP8 = "-fp8"
"""Suffix of a variant whose core computes in FP8."""
COMPILED = "-compiled"
"""Suffix of a variant whose layers are compiled with ``torch.compile``."""

_LOOPED = ("base", "residual", "anchor", "mesh")
_IN_FP8 = (f"base{FP8}", f"mesh{FP8}")

ShapeName = Literal["160m", "410m", "1b", "1.4b", "2.8b", "6.9b-slice"]
EagerAttention = Literal["sdpa", "eager"]
"""transformers' names for ``scaled_dot_product_attention`` and for attention with explicit scores."""


@dataclass(frozen=True)
class VariantKind:
    """What a variant's name means."""

    scheme: str
    """A recurrence scheme, ``plain`` or ``eager``."""
    fp8: bool
    compiled: bool

    @property
    def has_countable_states(self) -> bool:
        """Whether hidden states can be recognised among the saved tensors by their shape [S, B, H]."""
        return self.scheme != EAGER and not self.fp8 and not self.compiled


def kind_of(name: str) -> VariantKind:
    """Parse a variant's name.

    Raises:
        UserError: there is no such variant.
    """
    rest = name.removesuffix(COMPILED)
    scheme = rest.removesuffix(FP8)
    if scheme not in (PLAIN, EAGER, *SCHEMES):
        raise UserError(
            f"--variants {name}: no such variant; use {PLAIN}, {EAGER} or a scheme ({', '.join(SCHEMES)}), "
            f"followed by {FP8} (not for {EAGER}), {COMPILED} or both in this order"
        )
    if scheme == EAGER and rest != scheme:
        raise UserError(f"--variants {name}: the eager loop has no FP8; remove {FP8}")
    return VariantKind(scheme, fp8=rest != scheme, compiled=rest != name)


@dataclass(frozen=True)
class StepShape:
    """A model size, and the variants that fit together on a GPU with 141 GB at 2,048 tokens in bf16."""

    layers: str
    hidden_size: int
    num_attention_heads: int
    micro_batch_size: int
    variants: tuple[str, ...]


SHAPES: dict[ShapeName, StepShape] = {
    "160m": StepShape("2+4R2+2", 768, 12, 16, (PLAIN, *_LOOPED, EAGER, *_IN_FP8)),
    "410m": StepShape("4+8R2+4", 1024, 16, 8, (PLAIN, *_LOOPED, EAGER, *_IN_FP8)),
    "1b": StepShape("3+5R2+3", 2048, 8, 4, (PLAIN, *_LOOPED, EAGER)),
    "1.4b": StepShape("4+8R2+4", 2048, 16, 4, (PLAIN, "base", "mesh", EAGER)),
    "2.8b": StepShape("6+10R2+6", 2560, 32, 2, (PLAIN, "base", "mesh")),
    # As wide as 6.9B, but not as deep: weights, gradients and optimizer of 6+10R2+6 would need 400 GB.
    "6.9b-slice": StepShape("1+4R2+1", 4096, 32, 4, ("base", "mesh", *_IN_FP8)),
}


@dataclass(frozen=True)
class StepSettings:
    """Settings of one comparison. ``complete`` fills in unset ones from the shape and the machine."""

    variants: tuple[str, ...] | None = None
    """Models to compare: plain (Megatron-core's GPT of equal depth), eager (a loop of Hugging Face layers)
    or a recurrence scheme. Append -fp8 for FP8 and -compiled for torch.compile, e.g. mesh-fp8. Each variant
    is compared with those named before it. (default: the shape's; on a CPU plain base mesh)"""
    shape: ShapeName | None = None
    """Model size: layers, widths and, on a GPU, the micro-batch size. (default: 410m on a GPU, else 160m)"""
    layers: str | None = None
    """Layers as prelude+coreRloops+coda; plain is as deep as the unrolled loop. (default: the shape's)"""
    hidden_size: int | None = None
    """Hidden size H. (default: the shape's)"""
    num_attention_heads: int | None = None
    """Number of attention heads. (default: the shape's)"""
    vocab_size: int = 50277
    """Vocabulary size before padding."""
    seq_length: int | None = None
    """Sequence length S in tokens. (default: 2048 on a GPU, 128 on a CPU)"""
    micro_batch_size: int | None = None
    """Sequences per micro-batch B. (default: the shape's on a GPU, 1 on a CPU)"""
    num_micro_batches: int = 8
    """Number of micro-batches per step."""
    bf16: bool | None = None
    """Train in bfloat16 with float32 main parameters and gradients (eager: with autocast).
    (default: on a GPU)"""
    fp8_recipe: Literal["tensorwise", "blockwise", "delayed"] = "tensorwise"
    """FP8 scaling of the -fp8 variants: per tensor from current values, per block, or delayed (from an amax
    history)."""
    fp8_scope: Literal["core", "all"] = "core"
    """Layers of the -fp8 variants that use FP8: the core or all. In plain, which has no core, all do."""
    eager_attention: EagerAttention = "sdpa"
    """Attention of the eager variant: sdpa (transformers' default), or eager (explicit scores)."""
    gradient_accumulation_fusion: bool = False
    """Accumulate weight gradients in float32 inside the matrix product (needs Transformer Engine or apex)."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Recompute attention (selective) or whole layers (full) in the backward pass; not for eager.
    (default: off)"""
    steps: int = 20
    """Number of measured steps per variant."""
    warmup: int = 2
    """Number of warm-up steps per variant, which are not measured."""
    seed: int = 1234
    """Random seed for weights, data and the order of the variants."""
    threads: int | None = None
    """Number of CPU threads. (default: torch's choice)"""
    nvtx: bool = False
    """Mark passes and cycles in every step with NVTX ranges, for Nsight Systems."""
    profile: Path | None = None
    """Write a trace of one more step of each variant to this directory, for ui.perfetto.dev."""
    output: Path | None = None
    """Write all measurements to this JSON file, and the tables to a Markdown file (.md) next to it, replacing
    those of an earlier run."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens in all micro-batches of a step. The settings must be complete."""
        assert self.micro_batch_size is not None and self.seq_length is not None
        return self.num_micro_batches * self.micro_batch_size * self.seq_length


def complete(settings: StepSettings, gpu: bool) -> StepSettings:
    """Fill in what is unset, from the shape and the machine."""
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
