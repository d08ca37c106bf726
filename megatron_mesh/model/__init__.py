"""Megatron-core's GPT with a block that loops: takes a resolved configuration, returns a built model.

Start reading at ``block.py``; ``build.py`` is the entry point.
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
