"""Name parameters as in the whole model, whatever part of it a rank holds, and count them by part."""

from collections import Counter
from collections.abc import Iterator

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn import Parameter

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


def whole_model_parameters(model: MeshGPTModel) -> Iterator[tuple[str, Parameter]]:
    """Yield ``model.named_parameters()``, with each layer's number in the whole model.

    With tied embeddings in a pipeline, the last rank's output projection gets the embedding's name.
    """
    layers = {
        f"{path}.": f"{path.rpartition('.')[0]}.{module.layer_number - 1}."
        for path, module in model.named_modules()
        if isinstance(module, TransformerLayer)
    }
    for name, parameter in model.named_parameters():
        if model.share_embeddings_and_output_weights and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        here = next((prefix for prefix in layers if name.startswith(prefix)), None)
        yield (name if here is None else layers[here] + name.removeprefix(here)), parameter


def count_parameters(model: MeshGPTModel) -> Counter[str]:
    """Count the parameters of a built model by part; shared ones count once."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = next(label for prefix, label in _PARTS.items() if name.startswith(prefix))
        counts[part] += parameter.numel()
    return counts
