"""Single layers read from a checkpoint, in which the layers of a part of the model are stacked.

Megatron-core's loader fills what a rank of a job holds; a lone process cannot ask it for one of many layers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_mesh.checkpoint.safe import SafeReader

Place = tuple[str, int | None]
"""Key of a tensor, and which of the layers stacked in it (None: it is no stack)."""


def read_slices(directory: Path, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, or layers of them, by the names that the caller gives them.

    Raises:
        KeyError: the checkpoint has no such tensor.
    """
    reader = SafeReader(directory)
    metadata = reader.read_metadata()
    planner = _SlicePlanner(places)
    planner.set_up_planner({}, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(plan, planner).wait()
    return {
        name: planner.targets[place] if place[1] is None else planner.targets[place].squeeze(0)
        for name, place in places.items()
    }


class _SlicePlanner(DefaultLoadPlanner):
    def __init__(self, places: Mapping[str, Place]):
        super().__init__()
        self.places = set(places.values())
        self.targets: dict[Place, Tensor] = {}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for key, layer in sorted(self.places, key=str):
            entry = self.metadata.state_dict_metadata[key]
            assert isinstance(entry, TensorStorageMetadata), key
            sizes, offsets = list(entry.size), [0] * len(entry.size)
            if layer is not None:
                sizes[0], offsets[0] = 1, layer
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            self.targets[key, layer] = torch.empty(sizes, dtype=entry.properties.dtype)
            items += create_read_items_for_chunk_list(key, entry, [chunk])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where in the targets a piece goes."""
        index = read_item.dest_index
        assert index.offset is not None
        stacked = (index.fqn, index.offset[0] if index.offset else 0)
        target = self.targets[stacked] if stacked in self.targets else self.targets[index.fqn, None]
        for dimension, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dimension, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Any) -> None:
        """Nothing is left to do: pieces are copied to their places."""
