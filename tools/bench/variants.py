"""Build what the step benchmark compares: models of one shape, each with its own gradients and optimizer."""

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.config.layout import padded_vocab_size
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import with_values
from megatron_mesh.data import Batch
from megatron_mesh.model import build_model, transformer_config
from megatron_mesh.model.build import init_weights
from megatron_mesh.model.implementation import choose, why_no_transformer_engine
from megatron_mesh.model.layer_spec import final_norm, layer_spec
from megatron_mesh.parallel import plain_stage
from megatron_mesh.runtime import device, profiling
from megatron_mesh.train.optimizer import build_optimizer, build_schedule
from megatron_mesh.train.step import train_step
from tools.bench.eager_loop import EagerLoop
from tools.bench.measure import Variant
from tools.bench.settings import EAGER, PLAIN, EagerAttention, StepSettings, kind_of

_SHARED_SETTINGS = (
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


class MegatronVariant(Variant):
    """A model with Megatron's DistributedDataParallel and optimizer. It takes the training loop's step."""

    def __init__(self, name: str, config: Config, plain: bool = False):
        """Build Megatron-core's own GPT if ``plain``, otherwise the model that ``config`` describes."""
        self.name, self.config = name, config
        self.model = build_plain(config) if plain else build_model(config)
        self.stage = plain_stage([self.model], config)
        self.optimizer = build_optimizer(config, self.stage)
        self.state = TrainState(build_schedule(config.optimizer, self.optimizer))

    def losses(self, batch: Batch) -> Tensor:
        where = device.device()
        tokens, positions, labels = (x.to(where) for x in (batch.tokens, batch.position_ids, batch.labels))
        return self.model(tokens, positions, attention_mask=None, labels=labels)

    def step(self, batches: Sequence[Batch]) -> None:
        train_step(self.stage, self.optimizer, self.state, iter(batches), self.config.training)

    @property
    def layers(self) -> Iterator[nn.Module]:
        return (module for module in self.model.modules() if isinstance(module, TransformerLayer))


def build_plain(config: Config) -> GPTModel:
    """Build Megatron-core's own GPT around our layer. No class above the layer is ours."""
    implementation = choose(config.precision, config.parallel)
    transformer = transformer_config(config, implementation)
    layers = [layer_spec(implementation, transformer.attention_backend)] * transformer.num_layers
    with device.device():
        model = GPTModel(
            transformer,
            TransformerBlockSubmodules(layers, final_norm(transformer)),
            vocab_size=padded_vocab_size(config.model),
            max_sequence_length=config.model.seq_length,
            position_embedding_type="rope",
            rotary_percent=config.model.rotary_percent,
            rotary_base=config.model.rotary_base,
            share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
        )
    init_weights(model, config.training.seed)
    return model


class EagerVariant(Variant):
    """An ``EagerLoop`` with a training step written by hand."""

    def __init__(self, name: str, config: Config, attention: EagerAttention = "sdpa"):
        """Build the model with this attention (see ``EagerLoop``) and torch's AdamW."""
        self.name, self.config = name, config
        torch.manual_seed(config.training.seed)
        with device.device():
            self.model: EagerLoop = EagerLoop(config.model, attention)
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
        )

    def losses(self, batch: Batch) -> Tensor:
        tokens, labels = batch.tokens.to(device.device()), batch.labels.to(device.device())
        with self._autocast():
            logits = self.model(tokens)
            return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    def step(self, batches: Sequence[Batch]) -> None:
        with profiling.named("clear"):
            self.optimizer.zero_grad()
        with profiling.named("forward-backward"):
            for batch in batches:
                (self.losses(batch) / len(batches)).backward()
        with profiling.named("update"):
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad)
            self.optimizer.step()

    @property
    def layers(self) -> Iterable[nn.Module]:
        return [*self.model.prelude, *self.model.core, *self.model.coda]

    def _autocast(self) -> AbstractContextManager:
        if not self.config.training.bf16:
            return nullcontext()
        return torch.autocast(device.device().type, torch.bfloat16)


def why_skipped(name: str, recipe: str = "tensorwise") -> str | None:
    """Why this machine cannot run a variant with this FP8 recipe; None if it can."""
    kind = kind_of(name)
    if kind.scheme == EAGER and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install -e '.[hf]')"
    if not kind.fp8:
        return None
    return why_no_transformer_engine() or device.why_no_fp8(recipe)


def variant_config(settings: StepSettings, name: str) -> Config:
    """Resolve the run of one variant. Without a shared core it is as deep as the unrolled loop.

    Raises:
        UserError: there is no such variant, or the sizes don't fit each other.
    """
    kind = kind_of(name)
    assert settings.micro_batch_size is not None, "settings must be complete"
    values: dict[str, Any] = {key: getattr(settings, key) for key in _SHARED_SETTINGS}
    values |= {
        "recurrence": {PLAIN: "vanilla", EAGER: "base"}.get(kind.scheme, kind.scheme),
        "global_batch_size": settings.micro_batch_size * settings.num_micro_batches,
        "train_iters": settings.warmup + settings.steps,
        "watchdog_timeout_minutes": 0.0,  # the benchmark doesn't report progress to the watchdog
    }
    if kind.fp8:
        fp8 = {"fp8_format": "hybrid", "fp8_recipe": settings.fp8_recipe, "fp8_scope": settings.fp8_scope}
        values |= fp8
    return resolve(with_values(Config(), values))


def build_variant(name: str, config: Config, eager_attention: EagerAttention = "sdpa") -> Variant:
    """Build model, gradients and optimizer. Megatron's process groups must exist."""
    kind = kind_of(name)
    variant: Variant
    if kind.scheme == EAGER:
        variant = EagerVariant(name, config, eager_attention)
    else:
        variant = MegatronVariant(name, config, plain=kind.scheme == PLAIN)
    if kind.compiled:
        for layer in variant.layers:
            layer.compile()
    return variant


def random_batches(count: int, sequences: int, seq_length: int, vocab_size: int, seed: int) -> list[Batch]:
    """Draw ``count`` micro-batches of uniform random ids. Every token counts in the loss."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(vocab_size, (sequences, seq_length + 1), generator=generator)
        ones, positions = torch.ones(sequences, seq_length), torch.arange(seq_length).expand(sequences, -1)
        batches.append(Batch(ids[:, :-1], ids[:, 1:], ones, positions))
    return batches


def batches_of(settings: StepSettings) -> list[Batch]:
    """Draw the micro-batches of a step."""
    assert settings.micro_batch_size is not None and settings.seq_length is not None
    return random_batches(
        settings.num_micro_batches,
        settings.micro_batch_size,
        settings.seq_length,
        settings.vocab_size,
        settings.seed,
    )
