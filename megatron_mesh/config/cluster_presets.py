"""Cluster presets: the 6.9B preset with a rank layout for clusters of H100 nodes, generated from one table.

``python -m megatron_mesh.config.cluster_presets examples/slurm/6.9b`` writes the YAML files. A test compares
them with the table, and the table with the planner. examples/slurm/6.9b/README.md explains the layouts.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mesh.config.presets import presets

MODEL = "pythia-6.9b.yaml"
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Cluster:
    """A row of the table. ``layout`` holds the settings of ranks and batch."""

    nodes: int
    layout: dict[str, Any]


CLUSTERS = (
    Cluster(4, {"micro_batch_size": 2}),
    Cluster(16, {"micro_batch_size": 2}),
    Cluster(64, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 2}),
)
_EVERYWHERE: dict[str, dict[str, Any]] = {
    "ranks: all other GPUs hold replicas, which shard the optimizer's state": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "precision: the core in FP8; prelude, coda, routers and memory in bfloat16": {
        "transformer_impl": "transformer_engine",
        "gradient_accumulation_fusion": True,
        "fp8_format": "hybrid",
        "fp8_recipe": "tensorwise",
        "fp8_scope": "core",
    },
}


def cluster_presets() -> Iterator[tuple[str, str]]:
    """Yield the file name and text of every preset."""
    model = dict(presets())[MODEL]
    for cluster in CLUSTERS:
        yield f"{cluster.nodes}-nodes.yaml", _text(cluster, model)


def _text(cluster: Cluster, model: str) -> str:
    gpus = cluster.nodes * GPUS_PER_NODE
    header = (
        f"# For {cluster.nodes} nodes of {GPUS_PER_NODE} GPUs ({gpus} H100 of 80 GB); the model is {MODEL}.\n"
    )
    own, sections = dict(cluster.layout), dict(_EVERYWHERE)
    ranks = next(iter(sections))
    batch = f"micro_batch_size: {own.pop('micro_batch_size')}\n"
    sections[ranks] = {**own, **sections[ranks]}
    lines = [batch if line.startswith("micro_batch_size:") else line for line in model.splitlines(True)]
    body = "\n".join(f"# {title}\n{yaml.safe_dump(s, sort_keys=False)}" for title, s in sections.items())
    return f"{header}{''.join(lines)}\n{body}"


def main() -> None:
    """Write every preset to a directory, replacing files of the same names."""
    parser = argparse.ArgumentParser(
        description=main.__doc__,
        epilog="example: python -m megatron_mesh.config.cluster_presets examples/slurm/6.9b",
    )
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in cluster_presets():
        (directory / name).write_text(text, encoding="utf-8")
    print(f"{len(CLUSTERS)} presets written to {directory}")


if __name__ == "__main__":
    main()
