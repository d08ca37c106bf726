"""Names of parameters as they are in the whole model, whatever part of it a rank holds."""

from collections.abc import Iterator

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn import Parameter

from megatron_mesh.model.gpt import MeshGPTModel


def whole_model_parameters(model: MeshGPTModel) -> Iterator[tuple[str, Parameter]]:
    """``model.named_parameters()`` with each layer's number in the whole model.

    The copy of a tied embedding that the last pipeline rank holds as its output projection is named as
    the embedding.
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
