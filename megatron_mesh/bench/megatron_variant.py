"""Variants that take the training loop's own step: our models, and Megatron-core's own GPT."""

from collections.abc import Iterator, Sequence

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_mesh.bench.variants import Variant
from megatron_mesh.checkpoint.state import TrainState
from megatron_mesh.config.derived import padded_vocab_size
from megatron_mesh.config.schema import Config
from megatron_mesh.data import Batch
from megatron_mesh.model import build_model, transformer_config
from megatron_mesh.model.implementation import choose
from megatron_mesh.model.init import init_weights
from megatron_mesh.model.layer_spec import final_norm, layer_spec
from megatron_mesh.parallel import plain_stage
from megatron_mesh.runtime import device
from megatron_mesh.train.optimizer import build_optimizer, build_schedule
from megatron_mesh.train.step import train_step


class MegatronVariant(Variant):
    """A model with Megatron's DistributedDataParallel and optimizer, trained by ``train_step``."""

    def __init__(self, name: str, config: Config, plain: bool = False):
        """``plain``: Megatron-core's GPT instead of the model that ``config`` names."""
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
    """Megatron-core's own model and block around our layer: no class of ours above the layer."""
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
