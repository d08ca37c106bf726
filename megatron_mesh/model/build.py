"""From a resolved configuration to a model, on the run's device or on none."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mesh.config.derived import padded_vocab_size
from megatron_mesh.config.schema import Config
from megatron_mesh.model.config import transformer_config
from megatron_mesh.model.gpt import MeshGPTModel
from megatron_mesh.model.init import init_weights
from megatron_mesh.model.layers import neox_layer_spec
from megatron_mesh.runtime import device


def build_model(config: Config) -> MeshGPTModel:
    """The model of this rank, initialised from the seed. Megatron's process groups must exist."""
    with device.device():
        model = _construct(config, ProcessGroupCollection.use_mpu_process_groups())
    init_weights(model, config.training.seed, config.model.depth_scaled_init)
    return model


def build_on_meta(config: Config, tp_rank: int = 0) -> MeshGPTModel:
    """The same modules with shapes but no memory, and without process groups: for counting."""
    groups = ProcessGroupCollection()
    groups.tp = _GroupShape(config.parallel.tensor_model_parallel_size, tp_rank)
    for name in ("pp", "cp", "dp", "dp_cp"):
        setattr(groups, name, _GroupShape(1, 0))
    groups.embd = None
    with torch.device("meta"):
        return _construct(config, groups)


class _GroupShape:
    """What module constructors ask of a process group."""

    def __init__(self, size: int, rank: int):
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def _construct(config: Config, groups: ProcessGroupCollection) -> MeshGPTModel:
    model = config.model
    return MeshGPTModel(
        transformer_config(config),
        neox_layer_spec(),
        vocab_size=padded_vocab_size(model),
        max_sequence_length=model.seq_length,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        pg_collection=groups,
    )
