"""The three data sets of a run, from .bin/.idx prefixes, on Megatron's GPTDataset and an index cache."""

import socket
from collections.abc import Mapping
from typing import NamedTuple

from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_mesh.config.schema import DataConfig
from megatron_mesh.data import cache
from megatron_mesh.data.blend import parse_blend, parse_split
from megatron_mesh.data.epoch import Epoch
from megatron_mesh.data.indexed import file_sizes
from megatron_mesh.data.plan import Planner, Source, StreamPlan
from megatron_mesh.data.stream import Part, SampleStream
from megatron_mesh.data.tokenizer import Tokenizer
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.agreement import from_every_rank, from_rank_zero, on_every_rank, rank


class Datasets(NamedTuple):
    """The three streams; validation and test are None where the settings name no data for them."""

    train: SampleStream
    valid: SampleStream | None
    test: SampleStream | None


def build_datasets(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    seed: int,
    train_samples: int,
    eval_samples: int,
) -> Datasets:
    """Open the data of a run; with torch.distributed, a collective operation.

    Training is the first ``train_samples`` samples of a stream that ``seed`` alone orders; validation and
    test are the first ``eval_samples`` of theirs, the same at every evaluation (read again from the start
    where there are fewer). A test share too small for one sequence is left out.

    Rank 0 inspects the data and builds what the index cache lacks. On nodes that don't see its cache, one
    rank per node builds it. Every rank then memory-maps the cache, and reads nothing else.

    Raises UserError, on every rank, for malformed settings, missing or damaged files, too little data, a
    cache that cannot be written, or data that differ between nodes.
    """
    sources = _sources(data)
    if sources[Split.train] is None:
        raise UserError(
            "No training data: give --data-path (with a training share in --split) or --train-data-path."
        )
    sizes = {Split.train: train_samples, Split.valid: eval_samples, Split.test: eval_samples}
    planner = Planner(data.data_cache_path, seq_length, seed)

    def planned() -> dict[Split, StreamPlan | None]:
        plans = {
            split: planner.stream(source, split, sizes[split])
            if source is not None and (split is Split.train or eval_samples > 0)
            else None
            for split, source in sources.items()
        }
        planner.build(plan for plan in plans.values() if plan is not None)
        return plans

    plans = from_rank_zero(planned)
    opener = _Opener(
        {
            split: _megatron_config(data, source, tokenizer, seq_length, seed)
            for split, source in sources.items()
            if source is not None
        },
        seed,
    )
    streams = _open_everywhere(opener, planner, {s: plan for s, plan in plans.items() if plan is not None})
    return Datasets(streams[Split.train], streams.get(Split.valid), streams.get(Split.test))


class _Opener:
    """Opens streams; the three share one reader of each prefix."""

    def __init__(self, configs: Mapping[Split, GPTDatasetConfig], seed: int) -> None:
        self._configs, self._seed = configs, seed
        self._data: dict[str, IndexedDataset] = {}

    def stream(self, plan: StreamPlan, split: Split) -> SampleStream | None:
        """The stream, or None if the cache entries that it needs aren't whole, or not visible here.

        Raises:
            UserError: the data files are missing here, or aren't those that rank 0 sees.
        """
        config = self._configs[split]
        parts = []
        for part in plan.parts:
            if (sizes := file_sizes(part.prefix)) != part.facts.sizes:
                raise UserError(
                    f"{part.prefix}.idx and .bin have {sizes[0]:,} and {sizes[1]:,} bytes, and rank 0 sees "
                    f"{part.facts.sizes[0]:,} and {part.facts.sizes[1]:,}; copy the same files to every node"
                )
            index = cache.load(part.key)
            if index is None:
                return None
            if part.prefix not in self._data:
                self._data[part.prefix] = IndexedDataset(part.prefix)
            data = self._data[part.prefix]
            parts.append(
                Part(part.prefix, part.weight, Epoch(data, part.prefix, part.documents, index, split, config))
            )
        blend = None if plan.blend is None else cache.load(plan.blend)
        if plan.blend is not None and blend is None:
            return None
        return SampleStream(parts, self._seed, plan.num_samples, blend, plan.order)


def _open_everywhere(
    opener: _Opener, planner: Planner, plans: Mapping[Split, StreamPlan]
) -> dict[Split, SampleStream]:
    """Open the streams on every rank. Where a node doesn't see the cache, its first such rank builds it."""
    streams, blind = _attempt(opener, plans)
    if not blind:
        return streams
    host = socket.gethostname()
    builds = rank() == min((r for r, where in blind.items() if where == host), default=None)
    on_every_rank(lambda: planner.build(plans.values()) if builds else None)
    streams, blind = _attempt(opener, plans)
    if blind:
        lost = min(blind)
        raise UserError(
            f"Rank {lost} on host {blind[lost]} doesn't see the index cache that a rank of the same host has "
            "just built; put --data-cache-path where all processes of a node see it."
        )
    return streams


def _attempt(
    opener: _Opener, plans: Mapping[Split, StreamPlan]
) -> tuple[dict[Split, SampleStream], dict[int, str]]:
    """The streams that open here, and the hosts of the ranks where not all of them do, by rank."""
    opened = on_every_rank(lambda: {split: opener.stream(plan, split) for split, plan in plans.items()})
    streams = {split: stream for split, stream in opened.items() if stream is not None}
    seen = from_every_rank((socket.gethostname(), len(streams) == len(plans)))
    return streams, {r: host for r, (host, complete) in enumerate(seen) if not complete}


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
