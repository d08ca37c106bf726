"""What is compared: models of one shape, each with its own gradients and optimizer, in one process."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mesh.bench.settings import EagerAttention, Settings
from megatron_mesh.bench.shapes import COMPILED, EAGER, FP8, PLAIN
from megatron_mesh.config.checks import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import with_values
from megatron_mesh.data import Batch
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES
from megatron_mesh.runtime import device
from megatron_mesh.runtime.transformer_engine import why_no_transformer_engine

_TAKEN_OVER = (
    "layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "vocab_size",
    "micro_batch_size",
    "bf16",
    "seed",
    "gradient_accumulation_fusion",
    "recompute_granularity",
)


class Variant(ABC):
    """A model under test with its optimizer."""

    name: str
    config: Config
    """The resolved run; of an eager loop, that of the scheme which it computes."""
    model: nn.Module

    @abstractmethod
    def losses(self, batch: Batch) -> Tensor:
        """A forward pass over one micro-batch, on the device: its loss, whole or by token."""

    @abstractmethod
    def step(self, batches: Sequence[Batch]) -> None:
        """Take an optimizer step on the loss per token of all ``batches``.

        Its stretches "clear", "forward-backward", "communication" (in forward-backward), "agreement" and
        "update" are named for stopwatches and profilers; one that a variant does not have takes no time.
        """

    @property
    @abstractmethod
    def layers(self) -> Iterable[nn.Module]:
        """Every layer once."""


@dataclass(frozen=True)
class Kind:
    """What the name of a variant says."""

    scheme: str
    """A scheme's name, ``plain`` or ``eager``."""
    fp8: bool
    compiled: bool

    @property
    def keeps_states(self) -> bool:
        """Whether what it keeps for backward can be told by shape: tensors [S, B, H] in one precision."""
        return self.scheme != EAGER and not self.fp8 and not self.compiled


def kind_of(name: str) -> Kind:
    """Read a variant's name.

    Raises:
        UserError: there is no such variant.
    """
    rest = name.removesuffix(COMPILED)
    scheme = rest.removesuffix(FP8)
    if scheme not in (PLAIN, EAGER, *SCHEMES):
        raise UserError(
            f"--variants {name}: no such variant; there are {PLAIN}, {EAGER}, {', '.join(SCHEMES)}, and each "
            f"but {EAGER} with {FP8}, each with {COMPILED} at its end"
        )
    if scheme == EAGER and rest != scheme:
        raise UserError(f"--variants {name}: the eager loop is not built in FP8; leave it out")
    return Kind(scheme, fp8=rest != scheme, compiled=rest != name)


def why_skipped(name: str, recipe: str = "tensorwise") -> str | None:
    """What this machine lacks for a variant, with that recipe of FP8; None where it can run."""
    kind = kind_of(name)
    if kind.scheme == EAGER and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install -e '.[hf]')"
    if not kind.fp8:
        return None
    return why_no_transformer_engine() or device.why_no_fp8(recipe)


def variant_config(settings: Settings, name: str) -> Config:
    """The resolved run of one variant; where nothing is shared the layers are as many as the unrolled depth.

    Raises:
        UserError: no such variant, or sizes that do not fit.
    """
    kind = kind_of(name)
    assert settings.micro_batch_size is not None, "settings must be complete"
    values: dict[str, Any] = {key: getattr(settings, key) for key in _TAKEN_OVER}
    values |= {
        "recurrence": {PLAIN: "vanilla", EAGER: "base"}.get(kind.scheme, kind.scheme),
        "global_batch_size": settings.micro_batch_size * settings.num_micro_batches,
        "train_iters": settings.warmup + settings.steps,
        "watchdog_timeout_minutes": 0.0,  # nobody tells it that steps go on
    }
    if kind.fp8:
        fp8 = {"fp8_format": "hybrid", "fp8_recipe": settings.fp8_recipe, "fp8_scope": settings.fp8_scope}
        values |= fp8
    return resolve(with_values(Config(), values))


def build_variant(name: str, config: Config, eager_attention: EagerAttention = "sdpa") -> Variant:
    """Model, gradients and optimizer. Megatron's process groups must exist."""
    kind = kind_of(name)
    variant: Variant
    if kind.scheme == EAGER:
        from megatron_mesh.bench.eager_loop import EagerVariant

        variant = EagerVariant(name, config, eager_attention)
    else:
        from megatron_mesh.bench.megatron_variant import MegatronVariant

        variant = MegatronVariant(name, config, plain=kind.scheme == PLAIN)
    if kind.compiled:
        for layer in variant.layers:
            layer.compile()
    return variant


def random_batches(count: int, sequences: int, seq_length: int, vocab_size: int, seed: int) -> list[Batch]:
    """``count`` micro-batches of uniform random ids, all of them counted in the loss."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(vocab_size, (sequences, seq_length + 1), generator=generator)
        ones, positions = torch.ones(sequences, seq_length), torch.arange(seq_length).expand(sequences, -1)
        batches.append(Batch(ids[:, :-1], ids[:, 1:], ones, positions))
    return batches


def batches_of(settings: Settings) -> list[Batch]:
    """The micro-batches of a step."""
    assert settings.micro_batch_size is not None and settings.seq_length is not None
    return random_batches(
        settings.num_micro_batches,
        settings.micro_batch_size,
        settings.seq_length,
        settings.vocab_size,
        settings.seed,
    )
