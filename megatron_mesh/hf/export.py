"""From a Megatron checkpoint to a directory for Hugging Face, shard by shard."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.serialization import StateDictSplit
from rich.console import Console
from rich.progress import track
from torch import Tensor

from megatron_mesh.checkpoint import offline
from megatron_mesh.checkpoint.directory import Checkpoint
from megatron_mesh.checkpoint.index import Index
from megatron_mesh.checkpoint.reader import read_tensor
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.data.tokenizer import Tokenizer, check_vocab
from megatron_mesh.errors import UserError
from megatron_mesh.hf import describe, folding, ship, vocabulary
from megatron_mesh.hf.names import EMBEDDING, VOCABULARY, Entry, entries
from megatron_mesh.hf.padding import padding_of
from megatron_mesh.hf.tokenizer import tokenizer_of, write_tokenizer
from megatron_mesh.hf.weights import write_tensors
from megatron_mesh.recurrence import SCHEMES
from megatron_mesh.runtime import strict_json

SHARD_BYTES = 2 * 2**30
"""Size of a file of weights. The export needs about twice this much host memory."""


def export_checkpoint(
    checkpoint: Path,
    directory: Path,
    *,
    tokenizer_model: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint's weights as a directory that ``from_pretrained`` loads.

    The directory gets its name when it is complete.

    Args:
        checkpoint: an iter_... directory, or a run's, of which the newest checkpoint is taken.
        directory: must not exist, or be empty, without ``force``.
        tokenizer_model: as the setting; default: the one of the training.
        dtype: of the weights; default: the checkpoint's.
        force: replace ``directory``.

    Raises:
        UserError: the checkpoint is not whole; the tokenizer is missing, has more ids than the model,
            or gives other ids in transformers; or ``directory`` is taken, cannot be made, or holds the
            checkpoint.
    """
    _check_target(directory, force)
    saved = offline.open_checkpoint(checkpoint)
    tokenizer = tokenizer_of(saved.config.data, tokenizer_model)
    ids, trained = _ids(saved.config.model, tokenizer)
    directory = directory.resolve()  # a link stays one: what it points to is replaced
    if saved.path.resolve().is_relative_to(directory):
        raise UserError(f"--save {directory} holds the checkpoint itself ({saved.path}); choose another")
    partial = _empty_partial(directory)
    needs_code = tokenizer is not None and _write_tokenizer(tokenizer, partial, saved.config.model.seq_length)
    with offline.name_checkpoint_in_errors(saved.path):
        dtype = _write_weights(saved, partial, trained, ids.rows, dtype, shard_bytes)
    _write_texts(saved, partial, ids, str(dtype).removeprefix("torch."), needs_code)
    _put_in_place(partial, directory)


def _check_target(directory: Path, force: bool) -> None:
    """Raise UserError if ``directory`` is taken."""
    if directory.is_file():
        raise UserError(f"--save {directory} is a file; choose another --save")
    if directory.is_dir() and any(directory.iterdir()) and not force:
        raise UserError(f"{directory} exists already; choose another --save, or replace it with --force")


def _empty_partial(directory: Path) -> Path:
    """Where a directory is written until it is complete; without what an interrupted conversion left."""
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--save {directory} cannot be written ({error}); choose another --save") from None
    return partial


def _put_in_place(partial: Path, directory: Path) -> None:
    """Give a complete directory its name; what had the name before is removed after that."""
    replaced = directory.with_name(f"{directory.name}.replaced")
    if directory.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        directory.rename(replaced)
    partial.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def _ids(model: ModelConfig, tokenizer: Tokenizer | None) -> tuple[describe.Ids, int]:
    """Return the ids of an export, and how many of them the training had.

    Without a tokenizer, those of the data are below ``vocab_size``.
    """
    assert model.vocab_size is not None, "a checkpoint has the size of its vocabulary"
    if tokenizer is None:
        return describe.Ids(model.vocab_size), model.vocab_size
    check_vocab(tokenizer, model.vocab_size)
    padding = padding_of(tokenizer)
    rows = tokenizer.vocab_size + padding.is_new
    return describe.Ids(rows, tokenizer.eod, padding.id), tokenizer.vocab_size


def _write_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> bool:
    """Write a tokenizer, first of all since it may be refused; return whether it is code of ours."""
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
        raise UserError(f"{saved.path} lacks {absent[0]}: it is not a checkpoint of this model")
    plan = split_state_dict_into_shards_factory(
        wanted,
        get_storage_size=lambda entry: torch.Size(entry.shape).numel() * entry.dtype(target).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    left_out: dict[str, Tensor] = {}
    shards = track(plan.filename_to_tensors.items(), "shards", console=Console(stderr=True))
    for file_name, names in shards:
        shard = [wanted[name] for name in names]
        left_out |= _write_shard(index, shard, trained, target, directory / file_name)
    _write_index(plan, directory)
    if folding.needs_file(model) and target == stored[EMBEDDING].dtype:
        embedding = read_tensor(index, EMBEDDING)
        folding.write(vocabulary.to_export(embedding, trained, rows), directory)
    vocabulary.keep(left_out, directory)
    return target


def _write_shard(
    index: Index, shard: list[Entry], trained: int, dtype: torch.dtype, path: Path
) -> dict[str, Tensor]:
    """Write one file of weights; return the rows of the vocabulary that it leaves out, by key."""
    converted, left_out = {}, {}
    for entry in shard:
        tensor = read_tensor(index, entry.key, layer=entry.layer)
        if entry.key in VOCABULARY:
            left_out[entry.key] = tensor[trained:].to(dtype, copy=True)  # a view would keep all rows
            tensor = vocabulary.to_export(tensor, trained, entry.shape[0])
        if entry.factor != 1:
            tensor = tensor * entry.factor
        converted[entry.name] = tensor.to(entry.dtype(dtype)).contiguous()
    write_tensors(converted, path)
    return left_out


def _write_index(plan: StateDictSplit, directory: Path) -> None:
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_texts(
    saved: Checkpoint, directory: Path, ids: describe.Ids, dtype: str, tokenizer_needs_code: bool
) -> None:
    model = saved.config.model
    _write_json(directory / "config.json", describe.config_json(model, dtype, ids))
    _write_json(directory / "generation_config.json", describe.generation_json(ids))
    card = describe.model_card(saved, ids, tokenizer_needs_code)
    (directory / "README.md").write_text(card, encoding="utf-8")
    if SCHEMES[model.recurrence].has_loop:
        _write_code(ship.sources(), directory)


def _write_code(sources: dict[str, str], directory: Path) -> None:
    for name, text in sources.items():
        (directory / name).write_text(text, encoding="utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(strict_json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
