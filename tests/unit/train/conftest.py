"""A small corpus, and runs of the complete training loop in this process."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mesh.checkpoint.load import Search
from megatron_mesh.config.schema import Config
from megatron_mesh.data.indexed import IndexedWriter
from megatron_mesh.metrics.console import Record, Sink
from megatron_mesh.metrics.log import Log
from megatron_mesh.runtime.device import pack_generators
from megatron_mesh.runtime.distributed import process_groups
from megatron_mesh.runtime.stopping import StopRequests
from megatron_mesh.train.loop import build_run, train
from tests.helpers import tiny_config


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of 300 documents of skewed random ids below 128."""
    prefix = str(tmp_path_factory.mktemp("corpus") / "text")
    random = np.random.default_rng(0)
    documents = [random.zipf(1.3, size=random.integers(20, 60)) % 128 for _ in range(300)]
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add(np.concatenate(documents).astype(np.uint16), np.array([len(d) for d in documents]))
        writer.commit()
    return prefix


@pytest.fixture
def tiny(corpus: str) -> Callable[..., Config]:
    """Returns the settings of a run of 6 steps on ``corpus``. Any setting can be changed by name."""
    torch.set_num_threads(1)

    def make(recurrence: str = "mesh", layers: str = "1+1R2+1", **settings: Any) -> Config:
        values = {
            "num_attention_heads": 2,
            "vocab_size": 128,
            "data_path": [corpus],
            "split": "80,10,10",
            "num_workers": 0,
            "train_iters": 6,
            "lr": 1e-2,
            "log_interval": 1,
            "eval_interval": 0,
            **settings,
        }
        return tiny_config(recurrence, layers, **values)

    return make


@dataclass
class Outcome(Sink):
    """The records of a run and its final state."""

    records: list[Record] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: list[torch.Tensor] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    rng: torch.Tensor = field(default_factory=torch.Tensor)
    ending: int = -1

    def write(self, record: Record) -> None:
        self.records.append(record)

    def values(self, name: str, kind: str = "train") -> list[Any]:
        """Return one logged value for each step."""
        return [record.values[name] for record in self.records if record.kind == kind]


def run(config: Config) -> Outcome:
    """Train with ``config``, without an output directory."""
    outcome = Outcome()
    with process_groups(config) as health:
        parts = build_run(config, Search(config.checkpoint))
        stop = StopRequests(config.checkpoint, time.monotonic())
        outcome.ending = train(parts, Log([outcome]), health, stop)
        inner = parts.optimizer.optimizer
        outcome.weights = {name: p.detach().clone() for name, p in parts.stage.modules[0].named_parameters()}
        for group in inner.param_groups:
            outcome.groups.append({name: value for name, value in group.items() if name != "params"})
            for parameter in group["params"]:
                moments = inner.state[parameter]
                outcome.optimizer += [
                    parameter.detach().clone(),
                    *(moments[name] for name in sorted(moments)),
                ]
        outcome.state = parts.state.state_dict()
        outcome.rng = pack_generators()
    return outcome


def tree(directory: Path) -> dict[str, bytes]:
    """Return every file below ``directory`` with its contents."""
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
