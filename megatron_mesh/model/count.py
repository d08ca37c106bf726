"""Parameters counted on real modules."""

from collections import Counter

from megatron_mesh.model.gpt import MeshGPTModel

_PARTS = {
    "embedding": "embedding",
    "decoder.prelude": "prelude",
    "decoder.core": "core",
    "decoder.coda": "coda",
    "decoder.layers": "layers",
    "decoder.recurrence": "recurrence",
    "decoder.final_layernorm": "final norm",
    "output_layer": "output projection",
}


def count_parameters(model: MeshGPTModel) -> Counter[str]:
    """Parameters by part, counted on real modules (shared ones once)."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = next(label for prefix, label in _PARTS.items() if name.startswith(prefix))
        counts[part] += parameter.numel()
    return counts
