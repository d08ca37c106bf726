"""The paper's models and their layouts on clusters of H100 nodes, as YAML files, each from one table.

``python -m megatron_mesh.config.presets examples`` writes ``configs`` and ``slurm/6.9b`` there, and tests
check that the files are up to date. Sources: MeSH (arXiv 2510.07739) on the Pythia suite (arXiv 2304.01373).
The layouts are explained in examples/slurm/6.9b/README.md.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mesh.config.layout import parse_layers
from megatron_mesh.config.resolve.model import resolve_model
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import with_values
from megatron_mesh.config.sizes import non_embedding_parameters
from megatron_mesh.recurrence import SCHEMES


@dataclass(frozen=True)
class Size:
    """A row of the table.

    The file of the first split is named after the size alone. ``sources`` names the values that aren't from
    the paper.
    """

    name: str
    hidden_size: int
    heads: int
    splits: tuple[str, ...]
    lr: float
    micro_batch_size: int
    sources: str = "all values from the paper"


_PYTHIA_LR = "peak learning rate from Pythia"
_OWN_SPLIT = f"split chosen here, {_PYTHIA_LR}"
SIZES = (
    Size("70m", 512, 8, ("1+2R2+1",), 1e-3, 8, _OWN_SPLIT),
    Size("160m", 768, 12, ("2+4R2+2",), 6e-4, 8),
    Size("410m", 1024, 16, ("4+8R2+4", "3+6R3+3"), 3e-4, 8, _PYTHIA_LR),
    Size("1b", 2048, 8, ("3+5R2+3",), 3e-4, 4, _PYTHIA_LR),
    Size("1.4b", 2048, 16, ("4+8R2+4",), 2e-4, 2),
    Size("2.8b", 2560, 32, ("6+10R2+6",), 1.6e-4, 1, _OWN_SPLIT),
    Size("6.9b", 4096, 32, ("6+10R2+6", "5+11R2+5"), 1.2e-4, 1, _OWN_SPLIT),
)
DEFAULT_SCHEME = "mesh"
PAPER_SCHEMES = (DEFAULT_SCHEME, "anchor-emb", "anchor", "residual", "base", "vanilla")
"""The paper's schemes. The head of each file lists their parameter counts."""


def presets() -> Iterator[tuple[str, str]]:
    """Yield the file name and text of every preset: one per size and split."""
    for size in SIZES:
        for split in size.splits:
            name = f"pythia-{size.name}" if split == size.splits[0] else f"pythia-{size.name}-{split}"
            yield f"{name}.yaml", _text(size, split)


def _settings(size: Size, split: str) -> dict[str, dict[str, Any]]:
    return {
        "model": {
            "recurrence": DEFAULT_SCHEME,
            "layers": split,
            "hidden_size": size.hidden_size,
            "num_attention_heads": size.heads,
            "seq_length": 4096,
            "vocab_size": 50277,
        },
        "training: 120,818 steps of 512 x 4,096 tokens": {
            "micro_batch_size": size.micro_batch_size,
            "global_batch_size": 512,
            "train_iters": 120818,
            "bf16": True,
        },
        "optimizer: AdamW; cosine to a tenth of the peak after 1 % warm-up": {
            "lr": size.lr,
            "min_lr": float(f"{size.lr / 10:.3g}"),
            "lr_decay_style": "cosine",
            "lr_warmup_fraction": 0.01,
            "weight_decay": 0.01,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "clip_grad": 1.0,
        },
        "data: GPT-NeoX-20B's tokenizer; set tokenizer_model to its tokenizer.json": {
            "tokenizer_type": "HuggingFaceTokenizer",
        },
    }


def _text(size: Size, split: str) -> str:
    sections = _settings(size, split)
    layers = parse_layers(split)
    header = (
        f"# Pythia-{size.name.upper()}, layers {split}: unrolled depth {layers.depth}, "
        f"{layers.unique_layers} layers of weights.\n"
        "# The flag --recurrence chooses another scheme. Non-embedding parameters:\n"
        f"{_parameter_table(sections)}"
        f"# Source: MeSH (arXiv 2510.07739); {size.sources}.\n"
    )
    body = "\n".join(f"# {title}\n{yaml.safe_dump(s, sort_keys=False)}" for title, s in sections.items())
    return f"{header}\n{body}"


def _parameter_table(sections: dict[str, dict[str, Any]]) -> str:
    flat = {name: value for section in sections.values() for name, value in section.items()}
    schemes: dict[int, list[str]] = {}  # by number of parameters
    for scheme in PAPER_SCHEMES:
        model = resolve_model(with_values(Config(), {**flat, "recurrence": scheme}).model)
        label = scheme if SCHEMES[scheme].has_loop else f"{scheme} ({model.layers} layers)"
        schemes.setdefault(non_embedding_parameters(model), []).append(label)
    return "".join(f"#   {count:>13,}  {', '.join(names)}\n" for count, names in schemes.items())


CLUSTER_MODEL = "pythia-6.9b.yaml"
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
    """Yield the file name and text of every layout of the 6.9B preset."""
    model = dict(presets())[CLUSTER_MODEL]
    for cluster in CLUSTERS:
        yield f"{cluster.nodes}-nodes.yaml", _cluster_text(cluster, model)


def _cluster_text(cluster: Cluster, model: str) -> str:
    gpus = cluster.nodes * GPUS_PER_NODE
    header = f"# For {cluster.nodes} nodes of {GPUS_PER_NODE} GPUs ({gpus} H100 of 80 GB); "
    header += f"the model is {CLUSTER_MODEL}.\n"
    own, sections = dict(cluster.layout), dict(_EVERYWHERE)
    ranks = next(iter(sections))
    batch = f"micro_batch_size: {own.pop('micro_batch_size')}\n"
    sections[ranks] = {**own, **sections[ranks]}
    lines = [batch if line.startswith("micro_batch_size:") else line for line in model.splitlines(True)]
    body = "\n".join(f"# {title}\n{yaml.safe_dump(s, sort_keys=False)}" for title, s in sections.items())
    return f"{header}{''.join(lines)}\n{body}"


def main() -> None:
    """Write every preset below a directory, replacing files of the same names."""
    parser = argparse.ArgumentParser(
        description=main.__doc__, epilog="example: python -m megatron_mesh.config.presets examples"
    )
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    for folder, files in {"configs": presets(), "slurm/6.9b": cluster_presets()}.items():
        (directory / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files:
            path = directory / folder / name
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
