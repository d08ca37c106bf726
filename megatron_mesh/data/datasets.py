"""Training, validation and test data from .bin/.idx prefixes, on Megatron's GPTDataset and index cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_mesh.config.schema import DataConfig
from megatron_mesh.data.blend import Share, parse_blend, parse_split
from megatron_mesh.data.indexed import inspect_prefix
from megatron_mesh.data.stream import Part, SampleStream
from megatron_mesh.data.tokenizer import Tokenizer
from megatron_mesh.errors import UserError

_Result = TypeVar("_Result")


class Datasets(NamedTuple):
    """The three streams; validation and test are None where the settings name no data for them."""

    train: SampleStream
    valid: SampleStream | None
    test: SampleStream | None


class Source(NamedTuple):
    """Where one of the three data sets comes from: the words of ``flag``, and a share of their documents."""

    flag: str
    words: list[str]
    split: str
    share: Share
    required: bool


def build_datasets(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    seed: int,
    train_samples: int,
    eval_samples: int,
) -> Datasets:
    """Open the data of a run; with torch.distributed, every rank must call this.

    Training is the first ``train_samples`` samples of a stream that ``seed`` alone orders; validation and
    test are the first ``eval_samples`` of theirs, the same at every evaluation (read again from the start
    where there are fewer). A test share too small for one sequence is left out.

    Rank 0 builds the index cache, then the others load it.
    Raises UserError, on every rank, for malformed settings, missing or damaged files, too little data,
    or a cache that cannot be written or is absent on this node.
    """
    sources = _sources(data)
    if sources[Split.train] is None:
        raise UserError(
            "No training data: give --data-path (with a training share in --split) or --train-data-path."
        )
    sizes = {Split.train: train_samples, Split.valid: eval_samples, Split.test: eval_samples}

    def build() -> list[SampleStream | None]:
        return [
            _build_stream(
                source, split, sizes[split], _megatron_config(data, source, tokenizer, seq_length, seed)
            )
            if source is not None and (split is Split.train or eval_samples > 0)
            else None
            for split, source in sources.items()
        ]

    train, valid, test = _rank_zero_first(build)
    assert train is not None
    return Datasets(train, valid, test)


def _sources(data: DataConfig) -> dict[Split, Source | None]:
    separate = {
        Split.train: ("--train-data-path", data.train_data_path),
        Split.valid: ("--valid-data-path", data.valid_data_path),
        Split.test: ("--test-data-path", data.test_data_path),
    }
    if data.data_path is None:
        return {
            split: Source(flag, words, _all_of(split), (0.0, 1.0), required=True) if words else None
            for split, (flag, words) in separate.items()
        }
    for flag, words in separate.values():
        if words:
            raise UserError(
                f"--data-path and {flag} are both given: use --data-path with --split, or the three others."
            )
    shares = parse_split(data.split)
    return {
        split: Source("--data-path", data.data_path, data.split, share, required=split is not Split.test)
        if share is not None
        else None
        for split, share in zip(Split, shares, strict=True)
    }


def _all_of(split: Split) -> str:
    return ",".join("1" if other is split else "0" for other in Split)


def _megatron_config(
    data: DataConfig, source: Source, tokenizer: Tokenizer, seq_length: int, seed: int
) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([part.prefix for part in parse_blend(source.words, source.flag)], None),
        split=source.split,
        path_to_cache=data.data_cache_path,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=False,  # the attention is causal by itself; a mask costs [S, S] per sample
    )


def _build_stream(source: Source, split: Split, size: int, config: GPTDatasetConfig) -> SampleStream | None:
    parts = []
    for part in parse_blend(source.words, source.flag):
        dataset = _build_epoch(part.prefix, source, split, config)
        if dataset is None:
            return None
        parts.append(Part(part.prefix, part.weight, dataset))
    return SampleStream(parts, config.random_seed, size)


def _build_epoch(prefix: str, source: Source, split: Split, config: GPTDatasetConfig) -> GPTDataset | None:
    """One epoch of one prefix; None if it is not required and has less than one sequence."""
    facts = inspect_prefix(prefix)
    first, last = (round(edge * facts.sequences) for edge in source.share)  # as BlendedMegatronDatasetBuilder
    documents = np.arange(first, last, dtype=np.int32)
    low_level = GPTDataset.build_low_level_dataset(prefix, config) if facts.sequences else None
    tokens = 0 if low_level is None else int(low_level.sequence_lengths[documents].sum())
    if low_level is None or tokens < config.sequence_length + 1:
        if not source.required:
            return None
        raise UserError(
            f"The {split.name} part of {prefix} has {tokens:,} tokens in {len(documents):,} of "
            f"{facts.sequences:,} documents; one sequence takes {config.sequence_length + 1:,} (--seq-length "
            "and a last label). Give more data, a shorter sequence, or another --split (0 leaves a part out)."
        )
    # The name is only a part of the cache's key: content instead of place, so that data written anew is
    # never read through an old index, and a cache built on another mount point is found.
    name = f"{Path(prefix).name}-{facts.fingerprint}"
    try:
        return GPTDataset(low_level, name, documents, None, split, config)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(_cache_problem(error, config.path_to_cache or f"{prefix}/cache")) from error


def _cache_problem(error: Exception, cache: str) -> str:
    if isinstance(error, FileNotFoundError) and dist.is_initialized() and dist.get_rank() != 0:
        return (
            f"The index cache {cache} is not on the node of rank {dist.get_rank()}: put --data-cache-path on "
            "a disk that all nodes share, or run tools/build_data_index.py on every node first."
        )
    if isinstance(error, OSError):
        return f"The index cache {cache} cannot be used: {error}; give a writable --data-cache-path."
    return f"The index cache {cache} is damaged ({error}); delete that directory and start again."


def _rank_zero_first(build: Callable[[], _Result]) -> _Result:
    """Run ``build`` on rank 0, then on the other ranks; bad input on rank 0 is raised on all of them.

    Megatron's build_generic_dataset leaves the other ranks waiting at a barrier when rank 0 fails.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return build()
    outcome: list[Any] = [None]
    result = None
    if dist.get_rank() == 0:
        try:
            result = build()
        except UserError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise UserError(outcome[0])
    return build() if result is None else result
