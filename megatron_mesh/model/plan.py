"""What a run will be, before anything touches a device: the text of ``--dry-run``."""

from collections import Counter
from dataclasses import replace

from megatron_mesh.config.derived import layout, padded_vocab_size
from megatron_mesh.config.schema import Config
from megatron_mesh.errors import UserError
from megatron_mesh.model.build import build_on_meta
from megatron_mesh.model.flops import flops_per_token
from megatron_mesh.model.gpt import MeshGPTModel
from megatron_mesh.model.memory import estimate_memory
from megatron_mesh.recurrence import SCHEMES

_PARTS = {
    "embedding": "embedding",
    "decoder.prelude": "prelude",
    "decoder.core": "core",
    "decoder.coda": "coda",
    "decoder.layers": "layers",
    "decoder.recurrence": "recurrence",
    "decoder.final_layernorm": "final norm",
    "output_layer": "output projection",
}
_EMBEDDINGS = ("embedding", "output projection")


def count_parameters(model: MeshGPTModel) -> Counter[str]:
    """Parameters by part, counted on real modules (shared ones once)."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = next(label for prefix, label in _PARTS.items() if name.startswith(prefix))
        counts[part] += parameter.numel()
    return counts


def plan_text(config: Config, world_size: int = 1) -> str:
    """The plan of a resolved run on ``world_size`` ranks.

    Raises:
        UserError: the size of the vocabulary is known only to a tokenizer that cannot be read.
    """
    config = _with_vocabulary(config)
    one_rank = replace(config, parallel=replace(config.parallel, tensor_model_parallel_size=1))
    counts = count_parameters(build_on_meta(one_rank))
    rows = [*_model_rows(config), *_parameter_rows(counts), *_run_rows(config, world_size)]
    rows += _memory_rows(config, count_parameters(build_on_meta(config)).total())
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _with_vocabulary(config: Config) -> Config:
    if config.model.vocab_size is not None:
        return config
    from megatron_mesh.data import build_tokenizer

    if config.data.tokenizer_model is None:
        raise UserError("the size of the vocabulary is not known; give --tokenizer-model or --vocab-size")
    tokenizer = build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    return replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))


def _model_rows(config: Config) -> list[tuple[str, str]]:
    model, layers = config.model, layout(config.model)
    scheme = SCHEMES[model.recurrence]
    depth = f"{layers.depth} layers, {layers.unique_layers} with weights of their own"
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


def _run_rows(config: Config, world_size: int) -> list[tuple[str, str]]:
    training, model, parallel = config.training, config.model, config.parallel
    assert training.global_batch_size is not None and training.train_iters is not None
    data_parallel = world_size // parallel.tensor_model_parallel_size
    micro_batches = training.global_batch_size // (training.micro_batch_size * data_parallel)
    per_step = training.global_batch_size * model.seq_length
    tokens = per_step * training.train_iters
    flops = flops_per_token(model)
    return [
        ("ranks", f"{world_size}: tensor {parallel.tensor_model_parallel_size} x data {data_parallel}"),
        ("micro-batches", f"{micro_batches} of {training.micro_batch_size} sequences per step and rank"),
        ("tokens per step", f"{per_step:,} ({training.global_batch_size:,} x {model.seq_length:,})"),
        ("steps", f"{training.train_iters:,} ({tokens:,} tokens)"),
        ("FLOPs per token", f"{flops:,.0f} (forward and backward, unrolled)"),
        ("FLOPs in all", f"{flops * tokens:.3e}"),
    ]


def _memory_rows(config: Config, parameters: int) -> list[tuple[str, str]]:
    memory = estimate_memory(config, parameters)

    def gib(count: int) -> str:
        return f"{count / 2**30:,.2f} GiB"

    return [
        ("memory per rank", f"{gib(memory.total)} (estimate)"),
        ("  weights", gib(memory.weights)),
        ("  gradients", gib(memory.gradients)),
        ("  optimizer", gib(memory.optimizer)),
        ("  activations", f"{gib(memory.activations)} (one micro-batch)"),
    ]
