"""Variants that train as the training loop does: our models, and Megatron-core's own GPT."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_mesh.bench.clock import now
from megatron_mesh.bench.variants import Variant
from megatron_mesh.config.derived import padded_vocab_size
from megatron_mesh.config.schema import Config
from megatron_mesh.data import Batch
from megatron_mesh.model import build_model, transformer_config
from megatron_mesh.model.implementation import choose
from megatron_mesh.model.init import init_weights
from megatron_mesh.model.layers import final_norm, layer_spec
from megatron_mesh.parallel import plain_stage
from megatron_mesh.runtime import device, ranges
from megatron_mesh.train.optimizer import build_optimizer
from megatron_mesh.train.step import run_batch


class MegatronVariant(Variant):
    """Megatron's schedule over the micro-batches, its DistributedDataParallel and its optimizer."""

    def __init__(self, name: str, config: Config, plain: bool = False):
        """``plain``: Megatron-core's GPT instead of the model that ``config`` names."""
        self.name, self.config = name, config
        self.model = build_plain(config) if plain else build_model(config)
        self.stage = plain_stage([self.model], config)
        self.optimizer = build_optimizer(config, self.stage)
        self._reduce = self.stage.config.finalize_model_grads_func
        self.stage.config.finalize_model_grads_func = self._timed_reduce
        self._seconds_reducing = 0.0

    def losses(self, batch: Batch) -> Tensor:
        where = device.device()
        tokens, positions, labels = (x.to(where) for x in (batch.tokens, batch.position_ids, batch.labels))
        return self.model(tokens, positions, attention_mask=None, labels=labels)

    def clear(self) -> None:
        self.stage.zero_grad_buffer()
        self.optimizer.zero_grad()

    def forward_backward(self, batches: Sequence[Batch]) -> float:
        run_batch(self.stage, iter(batches), self.config.training)
        return self._seconds_reducing

    def update(self) -> None:
        self.optimizer.step()

    @property
    def layers(self) -> Iterator[nn.Module]:
        return (module for module in self.model.modules() if isinstance(module, TransformerLayer))

    def _timed_reduce(self, *args: Any, **kwargs: Any) -> None:
        start = now()
        with ranges.named("communication"):
            self._reduce(*args, **kwargs)
        self._seconds_reducing = now() - start


def build_plain(config: Config) -> GPTModel:
    """Megatron-core's own model and block around our layer: no class of ours above the layer."""
    implementation = choose(config.precision, config.parallel)
    transformer = transformer_config(config, implementation)
    layers = [layer_spec(implementation)] * transformer.num_layers
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
