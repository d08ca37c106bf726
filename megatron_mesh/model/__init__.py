"""The model: Megatron-core's GPT with a block that loops.

In: a resolved ``Config`` (and the part that a pipeline rank holds). Out: a ``MeshGPTModel`` with its
initial weights. Start with ``block.py``; ``build.py`` puts the pieces together.
"""

from megatron_mesh.model.block import MeshTransformerBlock
from megatron_mesh.model.build import build_model, build_on_meta
from megatron_mesh.model.gpt import MeshGPTModel
from megatron_mesh.model.transformer_config import MeshTransformerConfig, transformer_config

__all__ = [
    "MeshGPTModel",
    "MeshTransformerBlock",
    "MeshTransformerConfig",
    "build_model",
    "build_on_meta",
    "transformer_config",
]
