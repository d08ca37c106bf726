"""Describe a run before it touches a device: the text of ``--dry-run``."""

from collections import Counter
from dataclasses import replace

from megatron_mesh.config.derived import layout, padded_vocab_size
from megatron_mesh.config.length import batch_sizes, last_sample, last_step
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config, ParallelConfig
from megatron_mesh.config.sizes import flops_per_token
from megatron_mesh.errors import UserError
from megatron_mesh.model import build_on_meta
from megatron_mesh.model.naming import count_parameters
from megatron_mesh.planner.plan import Plan, make_plan, ranks_text
from megatron_mesh.planner.saving import Disk
from megatron_mesh.planner.text import saving_rows, size
from megatron_mesh.recurrence import SCHEMES

_RANKS_PER_NODE = 8
_EMBEDDINGS = ("embedding", "output projection")


def dry_run_text(config: Config, world_size: int = 1) -> str:
    """Describe a resolved run on ``world_size`` ranks.

    Raises:
        UserError: the vocabulary size is not set, and there is no readable tokenizer to take it from.
    """
    config = resolve(with_vocabulary(config), world_size=world_size)
    one_rank = replace(config, parallel=ParallelConfig())
    counts = count_parameters(build_on_meta(one_rank))
    plan = make_plan(config, world_size)
    rows = [*_model_rows(config), *_parameter_rows(counts), *_run_rows(plan), *_memory_rows(plan)]
    rows += saving_rows(plan, Disk(), _RANKS_PER_NODE)
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def with_vocabulary(config: Config) -> Config:
    """Return ``config`` with the vocabulary size set, from its tokenizer if necessary."""
    if config.model.vocab_size is not None:
        return config
    from megatron_mesh.data import build_tokenizer

    if config.data.tokenizer_model is None:
        raise UserError("the vocabulary size is unknown; set --tokenizer-model or --vocab-size")
    tokenizer = build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    return replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))


def _model_rows(config: Config) -> list[tuple[str, str]]:
    model, layers = config.model, layout(config.model)
    scheme = SCHEMES[model.recurrence]
    depth = f"{layers.depth} layers, {layers.unique_layers} distinct"
    rows = [
        ("recurrence", f"{model.recurrence}: {scheme.formula}"),
        ("layers", f"{layers} (unrolled: {depth})"),
    ]
    if scheme.uses_memory:
        rows.append(("memory", f"{model.mesh_slots} slots, {layers.loops + 1} pairs of routers"))
    rows.append(
        (
            "width",
            f"hidden {model.hidden_size:,}, {model.num_attention_heads} heads, MLP {model.ffn_hidden_size:,}",
        )
    )
    rows.append(("vocabulary", f"{model.vocab_size:,}, padded to {padded_vocab_size(model):,}"))
    return rows


def _parameter_rows(counts: Counter[str]) -> list[tuple[str, str]]:
    rows = [("parameters", f"{counts.total():,}")]
    body = sum(n for part, n in counts.items() if part not in _EMBEDDINGS)
    rows.append(("  non-embedding", f"{body:,}"))
    rows += [(f"  {part}", f"{count:,}") for part, count in counts.items()]
    return rows


def _run_rows(plan: Plan) -> list[tuple[str, str]]:
    training, model = plan.config.training, plan.config.model
    assert training.global_batch_size is not None
    per_step = training.global_batch_size * model.seq_length
    tokens = last_sample(training) * model.seq_length
    flops = flops_per_token(model)
    rampup = []
    if training.rampup_batch_size:
        sizes, samples = batch_sizes(training), training.rampup_batch_size[2]
        growth = f"{sizes[0]:,} to {sizes[-1]:,} in {len(sizes) - 1} increments, over {samples:,} samples"
        rampup = [("batch size", growth)]
    return [
        ("ranks", f"{plan.world_size}: {ranks_text(plan)}"),
        (
            "micro-batches",
            f"{plan.pipeline.micro_batches} per step and replica, of size {training.micro_batch_size}",
        ),
        ("tokens per step", f"{per_step:,} ({training.global_batch_size:,} x {model.seq_length:,})"),
        *rampup,
        ("steps", f"{last_step(training):,} ({tokens:,} tokens)"),
        ("FLOPs per token", f"{flops:,.0f} (forward and backward, unrolled)"),
        ("FLOPs in total", f"{flops * tokens:.3e}"),
    ]


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    memory = max((rank.memory for rank in plan.ranks), key=lambda memory: memory.total)

    return [
        ("memory of the fullest rank", f"{size(memory.total)} (estimate)"),
        ("  weights", size(memory.weights)),
        ("  gradients", size(memory.gradients)),
        ("  optimizer", size(memory.optimizer)),
        ("  activations", size(memory.activations)),
    ]
