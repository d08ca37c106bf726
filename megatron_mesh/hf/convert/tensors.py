"""Maps tensor names of a checkpoint to those of an export, which must never change.

A checkpoint stacks the layers of a part (prelude, core or coda) along the first dimension of one tensor for
each parameter; an export has one tensor for each layer. The contents are equal: both interleave the rows of
query, key and value per head ([heads, 3, head size]). Only the vocabulary rows differ; see ``vocabulary.py``.

Folds a plain model's embedding scale into its exported embedding, and undoes this in a conversion back.

Stock GPT-NeoX doesn't scale its embedding. The factors of a rounded product cannot be recovered, so the
export stores the unscaled embedding in a separate file if it has no other copy of it. A conversion back uses
that file only if scaling it gives the export's embedding bit for bit: the export may have been trained since.

Vocabulary rows of an export: exactly one for each id of the tokenizer.

Training pads the vocabulary. Padded rows have no meaning, but each has a logit, so sampling could choose
them. An export therefore omits them, but stores them in a separate file that no engine loads, so that a
conversion back restores them bit for bit.

A new row, for a padding token that the vocabulary lacks or for padding, is the mean of the other rows. The
exponential of a mean logit is at most the mean of the exponentials, so next to V other rows the new row's
probability is at most 1 / V. An untrained row or a row of zeros has no such bound, since all other logits may
be far below 0.

Checks that a directory contains exactly the weights that its config.json describes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import frexp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mesh.config.layout import layout, padded_vocab_size
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert.weights import TRAINING_ONLY, ModelWeights, read_tensors, write_tensors
from megatron_mesh.model.transformer_config import recurrence_options
from megatron_mesh.recurrence import SCHEMES, build_scheme

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
VOCABULARY = (EMBEDDING, OUTPUT)
"""Names of the tensors that have one row for each id."""
RECURRENCE = "decoder.recurrence."


@dataclass(frozen=True)
class ExportTensor:
    """A tensor of an export, and its location in a checkpoint."""

    name: str
    """Name in the export."""
    key: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    """Shape in the export."""
    layer: int | None = None
    """Index along the first dimension of the checkpoint's tensor; None if it isn't stacked."""
    layers: int = 1
    """Size of that dimension."""
    factor: float = 1.0
    """Factor by which an export multiplies the checkpoint's tensor."""
    full_precision: bool = False
    """Whether the tensor is float32 even in a model of lower precision (``Scheme.full_precision``)."""

    def dtype(self, others: torch.dtype) -> torch.dtype:
        """Return the dtype of the tensor in a model whose other weights have the dtype ``others``."""
        return torch.promote_types(others, torch.float32) if self.full_precision else others


def entries(model: ModelConfig, rows: int | None = None) -> list[ExportTensor]:
    """List the tensors of a model's export, in the order of computation.

    A model without a loop becomes transformers' own GPT-NeoX, with the tensor names of released checkpoints.
    GPT-NeoX doesn't scale its embedding, so the scale is folded into the weights, which unties tied weights.

    Args:
        model: resolved settings of the model.
        rows: size of the vocabulary in the export (default: as in the checkpoint).
    """
    looped = SCHEMES[model.recurrence].has_loop
    body, head = ("model", "lm_head") if looped else ("gpt_neox", "embed_out")
    vocabulary = (padded_vocab_size(model) if rows is None else rows, model.hidden_size)
    folded = is_folded(model)
    factor = embedding_factor(model) if folded else 1.0
    found = [ExportTensor(f"{body}.embed_in.weight", EMBEDDING, vocabulary, factor=factor)]
    for ours, theirs, count in _parts(model):
        for index in range(count):
            for key, name, shape in _layer(model):
                full_key = f"decoder.{ours}layers.{key}"
                found.append(ExportTensor(f"{body}.{theirs}.{index}.{name}", full_key, shape, index, count))
    if looped:
        found += _recurrence(model, body)
    for kind in ("weight", "bias"):
        name, key = f"{body}.final_layer_norm.{kind}", f"decoder.final_layernorm.{kind}"
        found.append(ExportTensor(name, key, (model.hidden_size,)))
    if model.untie_embeddings_and_output_weights:
        found.append(ExportTensor(f"{head}.weight", OUTPUT, vocabulary))
    elif folded:
        found.append(ExportTensor(f"{head}.weight", EMBEDDING, vocabulary))
    return found


def _parts(model: ModelConfig) -> Iterator[tuple[str, str, int]]:
    """Yield prefix in the checkpoint, name in the export, and number of layers of each part."""
    layers = layout(model)
    if not SCHEMES[model.recurrence].has_loop:
        yield "", "layers", layers.depth
        return
    yield "prelude.", "prelude", layers.prelude
    if layers.shared:
        yield "core.", "core", layers.core
    else:
        for loop in range(layers.loops):
            yield f"cores.{loop}.", f"cores.{loop}", layers.core
    yield "coda.", "coda", layers.coda


def _layer(model: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name in the checkpoint, name in the export, and shape of each parameter of a layer."""
    assert model.ffn_hidden_size is not None, "resolve() fills in ffn_hidden_size"
    h, ffn = model.hidden_size, model.ffn_hidden_size
    linears = {
        "self_attention.linear_qkv": ("attention.query_key_value", (3 * h, h)),
        "self_attention.linear_proj": ("attention.dense", (h, h)),
        "mlp.linear_fc1": ("mlp.dense_h_to_4h", (ffn, h)),
        "mlp.linear_fc2": ("mlp.dense_4h_to_h", (h, ffn)),
    }
    # The checkpoint uses the names of Transformer Engine, which fuses a norm with the linear layer after it.
    norms = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "post_attention_layernorm"}
    for key, name in norms.items():
        yield f"{key}.layer_norm_weight", f"{name}.weight", (h,)
        yield f"{key}.layer_norm_bias", f"{name}.bias", (h,)
    for key, (name, shape) in linears.items():
        yield f"{key}.weight", f"{name}.weight", shape
        yield f"{key}.bias", f"{name}.bias", shape[:1]


def _recurrence(model: ModelConfig, body: str) -> list[ExportTensor]:
    options = recurrence_options(model)
    scheme = build_scheme(model.recurrence, model.hidden_size, layout(model).loops, options)
    return [
        ExportTensor(
            f"{body}.recurrence.{name}",
            f"{RECURRENCE}{name}",
            tuple(parameter.shape),
            full_precision=scheme.full_precision,
        )
        for name, parameter in scheme.named_parameters()
    ]


EMBEDDING_FILE = TRAINING_ONLY / "embedding_before_scaling.safetensors"
_OLD_NAME = "embedding_before_scaling.safetensors"
"""Location of the file in early exports."""
_NAME = "embedding"


def is_folded(model: ModelConfig) -> bool:
    """Whether the scale is folded into the weights when this (resolved) model is exported."""
    return model.scale_embeddings and not SCHEMES[model.recurrence].has_loop


def embedding_factor(model: ModelConfig) -> float:
    """Return the embedding scale."""
    return model.hidden_size**0.5


def needs_file(model: ModelConfig) -> bool:
    """Whether the unscaled embedding cannot be recovered from the export's weights.

    It can be if the scale is a power of two, since such products are exact, or if the weights are tied, since
    then the output projection is a copy of it.
    """
    exact = frexp(embedding_factor(model))[0] == 0.5
    return is_folded(model) and model.untie_embeddings_and_output_weights and not exact


def write_unscaled(embedding: Tensor, directory: Path) -> None:
    """Write the unscaled embedding [vocabulary, H] to an export's directory."""
    path = directory / EMBEDDING_FILE
    path.parent.mkdir(exist_ok=True)
    write_tensors({_NAME: embedding.contiguous()}, path)


def unfold(
    model: ModelConfig, ours: dict[str, Any], weights: ModelWeights, name: str, head: str
) -> tuple[ModelConfig, Tensor | None]:
    """Return settings and unscaled embedding of the model before its scale was folded.

    Args:
        model: settings according to the export's config.json.
        ours: the settings of the training run, if the export has them.
        weights: the export's weights.
        name, head: names of the export's embedding and output projection.

    Returns:
        ``model`` and None if nothing was folded, or if the export was trained since.
    """
    trained = replace(
        model,
        scale_embeddings=bool(ours.get("scale_embeddings")),
        untie_embeddings_and_output_weights=bool(ours.get("untie_embeddings_and_output_weights")),
    )
    if not ours or not is_folded(trained) or head not in weights:
        return model, None
    product = weights[name]
    stored = _stored_embedding(weights.directory)
    if not trained.untie_embeddings_and_output_weights:
        embedding = weights[head]
    elif stored is not None:
        embedding = stored[: len(product)]  # early exports also store the padded rows
    else:
        embedding = (product / embedding_factor(model)).to(product.dtype)
    if embedding.dtype != product.dtype or not torch.equal(embedding * embedding_factor(model), product):
        return model, None
    return trained, embedding


def _stored_embedding(directory: Path) -> Tensor | None:
    """Return the unscaled embedding if the export has a file for it."""
    for name in (EMBEDDING_FILE, _OLD_NAME):
        if (path := directory / name).is_file():
            return read_tensors(path).get(_NAME)
    return None


PADDING_FILE = TRAINING_ONLY / "vocabulary_padding.safetensors"


def to_export(weight: Tensor, trained: int, rows: int) -> Tensor:
    """Return [``rows``, H]: the first ``trained`` rows of [padded vocabulary, H], followed by new ones."""
    return _with_mean_rows(weight[:trained], rows)


def write_omitted_rows(weights: dict[str, Tensor], directory: Path) -> None:
    """Store the rows [*, H] that an export omits, by the names of the checkpoint's tensors."""
    if omitted := {name: weight.contiguous() for name, weight in weights.items() if len(weight)}:
        (directory / PADDING_FILE).parent.mkdir(exist_ok=True)
        write_tensors(omitted, directory / PADDING_FILE)


def read_omitted_rows(
    config: dict[str, Any], trained: ModelConfig, directory: Path
) -> dict[str, Tensor] | None:
    """Return the rows [*, H] that an export omits, by the names of the checkpoint's tensors.

    Return None if the vocabulary was resized after the export. Then each of its rows has a meaning, and the
    stored rows no longer belong to it.

    Args:
        config: contents of config.json.
        trained: settings that the model was trained with.
        directory: the export.
    """
    if trained.vocab_size is None:
        return None
    omitted = read_tensors(directory / PADDING_FILE) if (directory / PADDING_FILE).is_file() else {}
    rows = config["vocab_size"]
    old_rows = padded_vocab_size(trained) - len(omitted.get(EMBEDDING, ()))
    has_new_padding_token = rows == old_rows + 1 and config.get("pad_token_id") == old_rows
    return omitted if has_new_padding_token or (omitted and rows == old_rows) else None


def from_export(weight: Tensor, rows: int, omitted: Tensor | None) -> Tensor:
    """Return [``rows``, H]: the rows of an export, followed by those that it omits, or by new ones."""
    if omitted is None or omitted.shape[1:] != weight.shape[1:]:
        return _with_mean_rows(weight[:rows], rows)
    return torch.cat([weight[: rows - len(omitted)], omitted.to(weight.dtype)])


def _with_mean_rows(weight: Tensor, rows: int) -> Tensor:
    missing = rows - len(weight)
    if missing <= 0:
        return weight
    mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])


# Causal masks and rotary frequencies: old versions of transformers saved them, but no version reads them.
_BUFFERS = re.compile(r"(.*\.)?(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)")


def check_weights(model: ModelConfig, weights: ModelWeights, rows: int) -> torch.dtype:
    """Check names, shapes and dtypes of all tensors. Return their dtype, or float32 if they have several.

    float32 represents the values of every accepted dtype exactly. Tensors that are always in float32 don't
    count.

    Args:
        model: settings of the model.
        weights: the weights in the directory.
        rows: size of the vocabulary in the directory, without padding.

    Raises:
        UserError: a tensor is missing, unexpected, quantized or of the wrong shape, or weights that should be
            tied differ.
    """
    where = weights.directory
    if (count := layout(model).unique_layers) > len(weights):  # the list below might not fit in memory
        raise UserError(
            f"{where} has {len(weights)} tensors, which is too few for the {count} layers in its "
            "config.json; download or export the model again"
        )
    _check_embedding(model, weights, rows)
    listed = entries(model, rows)
    for entry in listed:
        _check_tensor(weights, entry.name, entry.shape)
    names = {entry.name for entry in listed}
    head = _head(model)
    if not model.untie_embeddings_and_output_weights and head in weights:
        names.add(head)
        if not torch.equal(weights[head], weights[_embedding(model)]):
            raise UserError(
                f"{where}: config.json ties {head} to the embedding, but the two differ, and versions of "
                "transformers use different ones; save the model with tie_word_embeddings set to false"
            )
    unexpected = [name for name in weights.others(names) if not _BUFFERS.fullmatch(name)]
    if unexpected:
        raise UserError(
            f"{where} contains tensors that its config.json doesn't account for (number: {len(unexpected)}; "
            f"first: {unexpected[0]}); they may be further layers, an adapter, or part of another model; "
            "remove them or correct config.json"
        )
    always_float32 = {entry.name for entry in listed if entry.full_precision}
    dtypes = {weights.dtype(name) for name in names - always_float32}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _check_embedding(model: ModelConfig, weights: ModelWeights, rows: int) -> None:
    """Check the hidden size and the vocabulary first: ``entries`` allocates routers of this hidden size."""
    _check_tensor(weights, _embedding(model), (rows, model.hidden_size))


def _check_tensor(weights: ModelWeights, name: str, shape: tuple[int, ...]) -> None:
    if name not in weights:
        raise UserError(
            f"{weights.directory} lacks the tensor {name}, which its config.json calls for; download or "
            "export the model again"
        )
    if (found := weights.shape(name)) != shape:
        raise UserError(
            f"{weights.directory}: {name} has the shape {list(found)}, but config.json calls for "
            f"{list(shape)}; download or export the model again"
        )


def _embedding(model: ModelConfig) -> str:
    return "model.embed_in.weight" if SCHEMES[model.recurrence].has_loop else "gpt_neox.embed_in.weight"


def _head(model: ModelConfig) -> str:
    return "lm_head.weight" if SCHEMES[model.recurrence].has_loop else "embed_out.weight"
