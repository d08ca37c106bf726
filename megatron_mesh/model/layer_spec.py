"""Choose the layer specs and the final norm that match the chosen implementation.

Transformer Engine is imported only if its layers are built.
"""

from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mesh.model.implementation import LOCAL, Implementation
from megatron_mesh.model.layers import SDPAttention, local_layer_spec, local_norm


def layer_spec(implementation: Implementation, attention: AttnBackend = AttnBackend.auto) -> ModuleSpec:
    """Return the spec of a GPT-NeoX layer.

    Args:
        implementation: if it is Transformer Engine, the package must be importable.
        attention: the backend of Transformer Engine's layers; ``local`` is torch's attention.
    """
    if implementation == LOCAL:
        return local_layer_spec()
    from megatron_mesh.model.layers_te import te_layer_spec

    spec = te_layer_spec()
    if attention is AttnBackend.local:
        spec.submodules.self_attention.submodules.core_attention = SDPAttention
    return spec


def final_norm(config: TransformerConfig) -> type:
    """Return the class of the norm after the last layer."""
    if config.transformer_impl == LOCAL:
        return local_norm()
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
