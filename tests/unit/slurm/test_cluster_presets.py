"""Cluster presets have the paper's model and optimizer, fit into memory and make valid batch scripts."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.presets import (
    CLUSTER_MODEL,
    CLUSTERS,
    GPUS_PER_NODE,
    cluster_presets,
)
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.planner.plan import Plan, make_plan
from tests.commands import tool

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples/slurm/6.9b"
H100_GIB = 80e9 / 2**30
ROOM_GIB = 6.0  # for CUDA, NCCL, temporary buffers and fragmentation
NODES = [cluster.nodes for cluster in CLUSTERS]


def read(path: Path, gpus: int) -> Config:
    return resolve(parse_args(["--config", str(path)]).config, world_size=gpus)


def plan(nodes: int) -> Plan:
    gpus = nodes * GPUS_PER_NODE
    return make_plan(read(FOLDER / f"{nodes}-nodes.yaml", gpus), gpus)


def test_the_files_are_what_the_table_gives() -> None:
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.yaml")}
    assert on_disk == dict(cluster_presets()), "run: make configs"


@pytest.mark.parametrize("nodes", NODES)
def test_model_optimizer_and_batch_are_the_papers(nodes: int) -> None:
    ours = plan(nodes).config
    papers = read(ROOT / "examples/configs" / CLUSTER_MODEL, nodes * GPUS_PER_NODE)
    training = replace(ours.training, micro_batch_size=papers.training.micro_batch_size)
    assert (ours.model, training, ours.optimizer) == (papers.model, papers.training, papers.optimizer)
    assert ours.precision.fp8_format == "hybrid" and ours.precision.fp8_scope == "core"


@pytest.mark.parametrize("nodes", NODES)
def test_it_fits_a_gpu_and_uses_all_of_them(nodes: int) -> None:
    found = plan(nodes)
    assert max(rank.memory.total for rank in found.ranks) / 2**30 < H100_GIB - ROOM_GIB
    samples = found.pipeline.micro_batches * found.config.training.micro_batch_size * found.data_parallel
    assert samples == 512 == found.config.training.global_batch_size


def test_the_readme_has_the_planners_figures() -> None:
    """A row for each preset: nodes, ranks, micro-batches and GiB."""
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    assert [int(nodes) for nodes, _ in rows] == NODES
    for nodes, row in rows:
        found = plan(int(nodes))
        (rank,) = found.ranks
        memory, parallel = rank.memory, found.config.parallel
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        expected = [
            f"{parallel.tensor_model_parallel_size} x {found.pipeline.ranks} x {found.data_parallel}",
            f"{found.pipeline.micro_batches} of {found.config.training.micro_batch_size}",
            *(f"{part / 2**30:.1f}" for part in parts),
            f"{found.timeline.bubble_share:.0%}",
            f"{rank.traffic.tensor / 2**30:.1f}",
            f"{(rank.traffic.gradients + rank.traffic.parameters) / 2**30:.1f}",
        ]
        assert row.split(" | ") == expected


@pytest.mark.parametrize("nodes", NODES)
def test_the_tool_makes_a_script_of_it(nodes: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = (ROOT / "examples/slurm/site.sh").read_text()
    text = re.sub(r"(?m)^PYTHON=\S+", f"PYTHON={sys.executable}", text)
    (tmp_path / "site.sh").write_text(text)
    submit = tool("submit_slurm")
    line = f"--site {tmp_path}/site.sh --nodes {nodes} --gpu-memory-gib 72 --save {tmp_path}/run"
    line += f" --config {FOLDER}/{nodes}-nodes.yaml --data-path /data/text --save-interval 500 --dry-run"
    submit(line.split())
    script = capsys.readouterr().out
    assert f"#SBATCH --nodes={nodes}\n" in script and "#SBATCH --ntasks-per-node=8\n" in script
