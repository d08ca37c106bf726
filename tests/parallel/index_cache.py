"""Open data through the index cache on one node, or on several without a shared disk. Runs in workers."""

import os
import socket
from pathlib import Path
from unittest import mock

from megatron_mesh.config.schema import DataConfig
from megatron_mesh.data import build_datasets, cache
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.distributed import rank
from tests.unit.data.corpora import NumberTokenizer


def open_data(root: Path, words: list[str], ranks_per_node: int, shared: bool) -> tuple[int, list[int]]:
    """Open the data; unless ``shared``, prefixes are relative to each node's own disk.

    Returns:
        The number of cache entries that this rank wrote, and the first token of some samples.
    """
    node = rank() // ranks_per_node
    written = []

    def publish(directory: Path, key: cache.Key) -> None:
        written.append(directory)
        real_publish(directory, key)

    real_publish, here = cache._publish, os.getcwd()
    os.chdir(root if shared else root / f"node{node}")
    try:
        with (
            mock.patch.object(socket, "gethostname", lambda: f"node{node}"),
            mock.patch.object(cache, "_publish", publish),
        ):
            datasets = build_datasets(
                DataConfig(data_path=words, split="90,10,0", data_cache_path="cache"),
                NumberTokenizer(),  # type: ignore[arg-type]
                seq_length=16,
                seed=1,
                train_samples=300,
                eval_samples=4,
            )
        return len(written), [int(datasets.train[i]["tokens"][0]) for i in range(0, 300, 7)]
    finally:
        os.chdir(here)


def refusal(*args: object) -> str:
    """Return the error message of ``open_data``."""
    try:
        open_data(*args)  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    return "none"
