"""Converts a checkpoint to a Hugging Face directory, one file of weights at a time."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.serialization import StateDictSplit
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from megatron_mesh.checkpoint import offline
from megatron_mesh.checkpoint.directory import Checkpoint
from megatron_mesh.checkpoint.index import Index
from megatron_mesh.checkpoint.reader import read_tensor
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.data.tokenizer import Tokenizer, check_vocab
from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert import describe, ship, tensors
from megatron_mesh.hf.convert.describe import ExportVocabulary
from megatron_mesh.hf.convert.export_tokenizer import padding_of, tokenizer_of, write_tokenizer
from megatron_mesh.hf.convert.tensors import EMBEDDING, VOCABULARY, ExportTensor, entries
from megatron_mesh.hf.convert.weights import write_tensors
from megatron_mesh.recurrence import SCHEMES
from megatron_mesh.runtime import strict_json

SHARD_BYTES = 2 * 2**30
"""Size of a weight file. The conversion needs about twice this much host memory."""


def export_checkpoint(
    checkpoint: Path,
    directory: Path,
    *,
    tokenizer_model: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint as a directory that ``from_pretrained`` loads.

    The files are written to ``directory``.partial, which is renamed once it is complete.

    Args:
        checkpoint: an iter_... directory, or a run's directory, whose newest checkpoint is converted.
        directory: the target. It must not exist or be empty, unless ``force`` is set.
        tokenizer_model: path of the tokenizer (default: the one that the run was trained with).
        dtype: dtype of the weights (default: the checkpoint's).
        force: replace ``directory`` if it exists.
        shard_bytes: size of a weight file.

    Raises:
        UserError: the checkpoint is incomplete or damaged; the tokenizer is missing, has more ids than the
            model, or gives different ids in transformers; or ``directory`` exists, cannot be written, or
            contains the checkpoint.
    """
    _check_target(directory, force)
    saved = offline.open_checkpoint(checkpoint)
    tokenizer = tokenizer_of(saved.config.data, tokenizer_model)
    exported, trained = _vocabulary(saved.config.model, tokenizer)
    directory = directory.resolve()  # keeps a symbolic link and replaces the directory that it points to
    if saved.path.resolve().is_relative_to(directory):
        raise UserError(
            f"--save {directory} contains the checkpoint that is converted, {saved.path}; choose another "
            "--save"
        )
    partial = _empty_partial(directory)
    needs_code = tokenizer is not None and _write_tokenizer(tokenizer, partial, saved.config.model.seq_length)
    with offline.name_checkpoint_in_errors(saved.path):
        dtype = _write_weights(saved, partial, trained, exported.rows, dtype, shard_bytes)
    _write_texts(saved, partial, exported, str(dtype).removeprefix("torch."), needs_code)
    _publish(partial, directory)


def _check_target(directory: Path, force: bool) -> None:
    """Raise UserError if ``directory`` must not be replaced."""
    if directory.is_file():
        raise UserError(f"--save {directory} is a file; choose another --save")
    if directory.is_dir() and any(directory.iterdir()) and not force:
        raise UserError(
            f"--save {directory} already exists; choose another --save, or add --force to replace it"
        )


def _empty_partial(directory: Path) -> Path:
    """Create the directory to write to, after removing what an interrupted conversion left there."""
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to --save {directory} ({error}); choose another directory") from None
    return partial


def _publish(partial: Path, directory: Path) -> None:
    """Rename the complete directory to its final name, then remove the directory that it replaces."""
    replaced = directory.with_name(f"{directory.name}.replaced")
    if directory.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        directory.rename(replaced)
    partial.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def _vocabulary(model: ModelConfig, tokenizer: Tokenizer | None) -> tuple[ExportVocabulary, int]:
    """Return the export's vocabulary, and the number of its ids that were used in training.

    Without a tokenizer, we only know that all ids in the training data are below ``vocab_size``.
    """
    assert model.vocab_size is not None, "a checkpoint states the size of its vocabulary"
    if tokenizer is None:
        return ExportVocabulary(model.vocab_size), model.vocab_size
    check_vocab(tokenizer, model.vocab_size)
    padding = padding_of(tokenizer)
    rows = tokenizer.vocab_size + padding.is_new
    return ExportVocabulary(rows, tokenizer.eod, padding.id), tokenizer.vocab_size


def _write_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> bool:
    """Write the tokenizer, and its code if it needs any. Return whether it does.

    This comes before the weights, so that a tokenizer that cannot be exported is reported at once.
    """
    try:
        needs_code = write_tokenizer(tokenizer, directory, max_length, padding_of(tokenizer))
    except UserError:
        shutil.rmtree(directory)
        raise
    if needs_code:
        _write_code(ship.tokenizer_source(), directory)
    return needs_code


def _write_weights(
    saved: Checkpoint, directory: Path, trained: int, rows: int, dtype: torch.dtype | None, shard_bytes: int
) -> torch.dtype:
    model = saved.config.model
    index = offline.open_index(saved.path)
    stored = index.entries
    target = stored[EMBEDDING].dtype if dtype is None else dtype
    wanted = {entry.name: entry for entry in entries(model, rows)}
    if absent := sorted({entry.key for entry in wanted.values()} - stored.keys()):
        raise UserError(
            f"{saved.path} has no tensor {absent[0]}, which the model in its config.yaml needs; convert "
            "another checkpoint"
        )
    plan = split_state_dict_into_shards_factory(
        wanted,
        get_storage_size=lambda entry: torch.Size(entry.shape).numel() * entry.dtype(target).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    omitted: dict[str, Tensor] = {}
    with Progress(console=Console(stderr=True)) as progress:  # ends before an error is printed
        for file_name, names in progress.track(plan.filename_to_tensors.items(), description="shards"):
            shard = [wanted[name] for name in names]
            omitted |= _write_shard(index, shard, trained, target, directory / file_name)
    _write_index(plan, directory)
    if tensors.needs_file(model) and target == stored[EMBEDDING].dtype:
        embedding = read_tensor(index, EMBEDDING)
        tensors.write_unscaled(tensors.to_export(embedding, trained, rows), directory)
    tensors.write_omitted_rows(omitted, directory)
    return target


def _write_shard(
    index: Index, shard: list[ExportTensor], trained: int, dtype: torch.dtype, path: Path
) -> dict[str, Tensor]:
    """Write one weight file. Return the vocabulary rows that it omits, by the checkpoint's tensor names."""
    converted, omitted = {}, {}
    for entry in shard:
        tensor = read_tensor(index, entry.key, layer=entry.layer)
        if entry.key in VOCABULARY:
            omitted[entry.key] = tensor[trained:].to(dtype, copy=True)  # a view would keep all rows in memory
            tensor = tensors.to_export(tensor, trained, entry.shape[0])
        if entry.factor != 1:
            tensor = tensor * entry.factor
        converted[entry.name] = tensor.to(entry.dtype(dtype)).contiguous()
    write_tensors(converted, path)
    return omitted


def _write_index(plan: StateDictSplit, directory: Path) -> None:
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_texts(
    saved: Checkpoint, directory: Path, exported: ExportVocabulary, dtype: str, tokenizer_needs_code: bool
) -> None:
    model = saved.config.model
    _write_json(directory / "config.json", describe.config_json(model, dtype, exported))
    _write_json(directory / "generation_config.json", describe.generation_json(exported))
    card = describe.model_card(saved, exported, tokenizer_needs_code)
    (directory / "README.md").write_text(card, encoding="utf-8")
    if SCHEMES[model.recurrence].has_loop:
        _write_code(ship.sources(), directory)


def _write_code(sources: dict[str, str], directory: Path) -> None:
    for name, text in sources.items():
        (directory / name).write_text(text, encoding="utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(strict_json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
