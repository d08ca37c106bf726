"""What is compared: models of one shape, each with its own gradients and optimizer, in one process."""

from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_mesh.bench.settings import PLAIN, Settings
from megatron_mesh.config.checks import resolve
from megatron_mesh.config.derived import padded_vocab_size
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import with_values
from megatron_mesh.data import Batch
from megatron_mesh.model import build_model, transformer_config
from megatron_mesh.model.init import init_weights
from megatron_mesh.model.layers import LayerNorm, neox_layer_spec
from megatron_mesh.parallel import Stage, plain_stage
from megatron_mesh.runtime import device
from megatron_mesh.train.optimizer import build_optimizer


@dataclass(frozen=True)
class Variant:
    """A model under test, as the training loop has it."""

    name: str
    config: Config
    stage: Stage
    optimizer: MegatronOptimizer


def variant_config(settings: Settings, name: str) -> Config:
    """The resolved run of one variant; where nothing is shared the layers are as many as the unrolled depth.

    Raises:
        UserError: no such scheme, or sizes that do not fit.
    """
    values = {
        "recurrence": "vanilla" if name == PLAIN else name,
        "layers": settings.layers,
        "hidden_size": settings.hidden_size,
        "num_attention_heads": settings.num_attention_heads,
        "seq_length": settings.seq_length,
        "vocab_size": settings.vocab_size,
        "micro_batch_size": settings.micro_batch_size,
        "global_batch_size": settings.micro_batch_size * settings.num_micro_batches,
        "train_iters": settings.warmup + settings.steps,
        "bf16": settings.bf16,
        "seed": settings.seed,
    }
    return resolve(with_values(Config(), values))


def build_variant(name: str, config: Config) -> Variant:
    """Model, gradient buffers and optimizer. Megatron's process groups must exist."""
    stage = plain_stage([build_plain(config) if name == PLAIN else build_model(config)], config)
    return Variant(name, config, stage, build_optimizer(config, stage))


def build_plain(config: Config) -> GPTModel:
    """Megatron-core's own model and block around our layer: no class of ours above the layer."""
    transformer = transformer_config(config)
    with device.device():
        model = GPTModel(
            transformer,
            TransformerBlockSubmodules([neox_layer_spec()] * transformer.num_layers, LayerNorm),
            vocab_size=padded_vocab_size(config.model),
            max_sequence_length=config.model.seq_length,
            position_embedding_type="rope",
            rotary_percent=config.model.rotary_percent,
            rotary_base=config.model.rotary_base,
            share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
        )
    init_weights(model, config.training.seed)
    return model


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
    return random_batches(
        settings.num_micro_batches,
        settings.micro_batch_size,
        settings.seq_length,
        settings.vocab_size,
        settings.seed,
    )
