"""Build a model from a resolved configuration, on the run's device or on torch's meta device."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn
from torch.overrides import TorchFunctionMode

from megatron_mesh.config.derived import padded_vocab_size
from megatron_mesh.config.placement import Part
from megatron_mesh.config.schema import Config
from megatron_mesh.model.gpt import MeshGPTModel
from megatron_mesh.model.implementation import LOCAL, Implementation, choose
from megatron_mesh.model.init import init_weights, zero_weights
from megatron_mesh.model.layer_spec import layer_spec
from megatron_mesh.model.transformer_config import transformer_config
from megatron_mesh.runtime import device


def build_model(
    config: Config, part: Part | None = None, *, initial_weights: bool = True, **stage: Any
) -> MeshGPTModel:
    """Build this rank's model. Megatron's process groups must exist. Global random generators don't advance.

    Args:
        part: the part of a looped model that this pipeline rank holds (default: all).
        initial_weights: draw the weights from the seed. If False they are zero, for a checkpoint to fill.
        stage: for a chunk of a plain model: ``pre_process``, ``post_process`` and ``vp_stage``.
    """
    implementation = choose(config.precision, config.parallel)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with device.device(), _SkipTorchInit():
        model = _construct(config, groups, part, implementation, **stage)
    if initial_weights:
        init_weights(model, config.training.seed, config.model.depth_scaled_init)
    else:
        zero_weights(model)
    return model


class _SkipTorchInit(TorchFunctionMode):
    """Skip the random initialization in torch's module constructors; ``init.py`` sets all values later."""

    _DRAWS = (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._DRAWS:
            return (*args, *(kwargs or {}).values())[0]
        return func(*args, **(kwargs or {}))


def build_on_meta(
    config: Config, tp_rank: int = 0, pp_rank: int = 0, part: Part | None = None, **stage: Any
) -> MeshGPTModel:
    """Build the same modules without memory or process groups, to count parameters.

    The layers are always local. Transformer Engine's have the same weights, but need a device.
    """
    groups = ProcessGroupCollection()
    groups.tp = _GroupShape(config.parallel.tensor_model_parallel_size, tp_rank)
    groups.pp = _GroupShape(config.parallel.pipeline_model_parallel_size, pp_rank)
    for name in ("cp", "dp", "dp_cp"):
        setattr(groups, name, _GroupShape(1, 0))
    groups.embd = None
    with torch.device("meta"):
        return _construct(config, groups, part, LOCAL, **stage)


class _GroupShape:
    """Stands in for a process group in module constructors, which only ask for its size and rank."""

    def __init__(self, size: int, rank: int):
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def _construct(
    config: Config,
    groups: ProcessGroupCollection,
    part: Part | None,
    implementation: Implementation,
    **stage: Any,
) -> MeshGPTModel:
    model, transformer = config.model, transformer_config(config, implementation)
    return MeshGPTModel(
        transformer,
        layer_spec(implementation, transformer.attention_backend),
        vocab_size=padded_vocab_size(model),
        unpadded_vocab_size=model.vocab_size,
        max_sequence_length=model.seq_length,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        pg_collection=groups,
        part=part,
        **stage,
    )
