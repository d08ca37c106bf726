"""Opens the training, validation and test data of a run, from prefixes of .bin and .idx files.

Samples come from Megatron's GPTDataset, whose index is in our own cache (``cache.py``). ``sources.py``
decides on rank 0 what every rank opens here.
"""

import socket
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_mesh.config.schema import DataConfig
from megatron_mesh.data import cache
from megatron_mesh.data.indexed import file_sizes
from megatron_mesh.data.sources import Planner, Source, StreamPlan, parse_blend, parse_sets, parse_split
from megatron_mesh.data.stream import Epoch, SampleStream, StreamSource
from megatron_mesh.data.tokenizer import Tokenizer
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.distributed import from_every_rank, from_rank_zero, on_every_rank, rank

_Name = tuple[Split, str]
"""The split that a stream is for, and the stream's name if that split has several."""


class Datasets(NamedTuple):
    """The streams of a run. Validation and test are None if the settings name no data for them."""

    train: SampleStream
    valid: SampleStream | None
    test: SampleStream | None
    valid_sets: Mapping[str, SampleStream] = MappingProxyType({})
    """Validation sets by name, if there are several. Then ``valid`` is None."""

    @property
    def validation(self) -> Mapping[str, SampleStream]:
        """The validation sets by name. A single one has the name ""."""
        return {"": self.valid} if self.valid is not None else self.valid_sets

    def named(self) -> dict[str, SampleStream]:
        """Return all streams by name: train, valid or valid/NAME ..., test."""
        streams = {"train": self.train, "valid": self.valid, "test": self.test}
        sets = {f"valid/{name}": stream for name, stream in self.valid_sets.items()}
        return {name: stream for name, stream in {**streams, **sets}.items() if stream is not None}


def build_datasets(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    seed: int,
    train_samples: int,
    eval_samples: int,
) -> Datasets:
    """Open the data of a run. Collective, if torch.distributed is initialized.

    Training reads the first ``train_samples`` samples of a stream whose order depends only on the data and
    ``seed``. Every evaluation reads the same ``eval_samples`` samples, some of them twice if the data have
    fewer. A test share that is too small for one sequence is left out.

    Rank 0 inspects the data and builds missing entries of the index cache. On each node that doesn't see rank
    0's cache, one rank builds them again. Then every rank only memory-maps the entries.

    Raises:
        UserError: on every rank, if settings are malformed, files are missing or damaged, there is too little
            data, the cache cannot be written, or data differ between nodes.
    """
    sources = _sources(data)
    if not any(source.kind is Split.train for source in sources.values()):
        raise UserError(
            "no training data; give --data-path (with a training share in --split) or --train-data-path"
        )
    planner = Planner(data.data_cache_path, seq_length, seed)

    def planned() -> dict[_Name, StreamPlan]:
        plans = {}
        for name, source in sources.items():
            count = train_samples if source.kind is Split.train else eval_samples
            if (source.kind is Split.train or count > 0) and (plan := planner.stream(source, count)):
                plans[name] = plan
        planner.build(plans.values())
        return plans

    plans = from_rank_zero(planned)
    opener = _Opener(
        {
            name: (source, _megatron_config(data, source, tokenizer, seq_length, seed))
            for name, source in sources.items()
        },
        seed,
        data.eod_mask_loss and data.eod_mask_loss_of in ("eod", "both"),
    )
    streams = _open_everywhere(opener, planner, plans)
    return Datasets(
        streams[Split.train, ""],
        streams.get((Split.valid, "")),
        streams.get((Split.test, "")),
        {name: stream for (split, name), stream in streams.items() if split is Split.valid and name},
    )


class _Opener:
    """Opens streams. Streams with the same prefix share a reader.

    Args:
        leave_out_eod: exclude predictions of end-of-document tokens from the loss.
    """

    def __init__(
        self, sources: Mapping[_Name, tuple[Source, GPTDatasetConfig]], seed: int, leave_out_eod: bool
    ) -> None:
        self._sources, self._seed, self._leave_out_eod = sources, seed, leave_out_eod
        self._data: dict[str, IndexedDataset] = {}

    def stream(self, plan: StreamPlan, name: _Name) -> SampleStream | None:
        """Open a stream, or return None if its cache entries are missing or damaged here.

        Raises:
            UserError: the data files are missing here, or differ from those that rank 0 sees.
        """
        source, config = self._sources[name]
        parts = []
        for part in plan.parts:
            if (sizes := file_sizes(part.prefix, source.flag)) != part.facts.sizes:
                raise UserError(
                    f"{part.prefix}.idx and .bin have {sizes[0]:,} and {sizes[1]:,} bytes here, but "
                    f"{part.facts.sizes[0]:,} and {part.facts.sizes[1]:,} on rank 0; copy the same files to "
                    "every node"
                )
            index = cache.load(part.key)
            if index is None:
                return None
            data = self._reader(part.prefix)
            epoch = Epoch(
                data,
                part.prefix,
                part.documents,
                index,
                source.kind,
                config,
                leave_out_eod=self._leave_out_eod,
            )
            parts.append(StreamSource(part.prefix, part.weight, epoch))
        blend = None if plan.blend is None else cache.load(plan.blend)
        if plan.blend is not None and blend is None:
            return None
        return SampleStream(parts, self._seed, plan.num_samples, blend, plan.order)

    def _reader(self, prefix: str) -> IndexedDataset:
        if prefix not in self._data:
            try:
                self._data[prefix] = IndexedDataset(prefix)
            except OSError as error:
                raise UserError(
                    f"{error.filename} cannot be read ({error.strerror}); check that this node has the data"
                ) from None
        return self._data[prefix]


def _open_everywhere(
    opener: _Opener, planner: Planner, plans: Mapping[_Name, StreamPlan]
) -> dict[_Name, SampleStream]:
    """Open the streams on every rank. If a node doesn't see the cache, one of its ranks builds its own."""
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
            f"rank {lost} on host {blind[lost]} doesn't see the index cache that another rank on that host "
            "has just built; give a --data-cache-path that all processes of a node see"
        )
    return streams


def _attempt(
    opener: _Opener, plans: Mapping[_Name, StreamPlan]
) -> tuple[dict[_Name, SampleStream], dict[int, str]]:
    """Return the streams that open on this rank, and the hosts of ranks that cannot open all, by rank."""
    opened = on_every_rank(lambda: {name: opener.stream(plan, name) for name, plan in plans.items()})
    streams = {name: stream for name, stream in opened.items() if stream is not None}
    seen = from_every_rank((socket.gethostname(), len(streams) == len(plans)))
    return streams, {r: host for r, (host, complete) in enumerate(seen) if not complete}


def _sources(data: DataConfig) -> dict[_Name, Source]:
    separate = {
        Split.train: ("--train-data-path", data.train_data_path),
        Split.valid: ("--valid-data-path", data.valid_data_path),
        Split.test: ("--test-data-path", data.test_data_path),
    }
    if data.data_path is None:
        return {
            (kind, name): Source(kind, flag, blend, _all_of(kind), (0.0, 1.0), required=True)
            for kind, (flag, words) in separate.items()
            if words
            for name, blend in (parse_sets(words, flag) if kind is Split.valid else {"": words}).items()
        }
    for flag, words in separate.values():
        if words:
            raise UserError(
                f"--data-path and {flag} are both given; give --data-path with --split, or one path per split"
            )
    return {
        (kind, ""): Source(
            kind, "--data-path", data.data_path, data.split, share, required=kind is not Split.test
        )
        for kind, share in zip(Split, parse_split(data.split), strict=True)
        if share is not None
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
        eod_mask_loss=data.eod_mask_loss and data.eod_mask_loss_of != "eod",
        create_attention_mask=False,  # causal attention needs none, and it would cost [S, S] per sample
    )
