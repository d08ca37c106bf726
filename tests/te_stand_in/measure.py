"""Run the real model on the stand-in and print what it did, as JSON.

    PYTHONPATH=tests/te_stand_in:. python tests/te_stand_in/measure.py [two]

This needs a separate process, because Megatron-core looks for Transformer Engine once, when it is imported,
and because ``compat.install``, which would hide it on a machine without a GPU, must not be called.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from transformer_engine.pytorch.fp8 import FP8_MAX, FP8GlobalStateManager

from megatron_mesh.checkpoint import fp8_state
from megatron_mesh.checkpoint.content import Content
from megatron_mesh.checkpoint.index import Index
from megatron_mesh.checkpoint.load import load_tensors
from megatron_mesh.checkpoint.offline import open_index, write
from megatron_mesh.checkpoint.save import describe_state
from megatron_mesh.model import layers_te
from megatron_mesh.parallel import Stage, build_stage
from megatron_mesh.parallel.ring import ring_chunks
from megatron_mesh.runtime.distributed import model_parallel_groups
from megatron_mesh.train.step import run_batch
from tests.helpers import loss_per_token, one_process, randomise, relative_error
from tests.te_gradients import (
    EVERYWHERE,
    FP8,
    batches,
    build,
    configure,
    gradients,
    linears,
    phases,
    stock_wrappers,
    train_step,
    worst,
)

# The stand-in's blocks are whole tensors, so the numbers equal those of tensorwise, but no cast is cached.
ALWAYS_CAST = {**EVERYWHERE, "fp8_recipe": "blockwise"}
CONTEXT = ({"global_batch_size": 8}, {"context_parallel_size": 2})
"""Two replicas with the same batches, and one model on two ranks."""


def ring() -> dict[str, Any]:
    """Compare fused with unfused gradients on one of two pipeline ranks, and count each weight's casts."""
    place = {"world_size": 2, "pipeline_model_parallel_size": 2, "global_batch_size": 8}
    unfused = phases(configure("2+2R2+2", **place, **ALWAYS_CAST), short=True)
    config = configure("2+2R2+2", gradient_accumulation_fusion=True, **place, **EVERYWHERE)
    found: dict[str, Any] = {"ours": worst(phases(config, short=True), unfused)}
    stage = build(config, naive=False)
    train_step(stage, config, 1)
    found["casts"] = sorted({module.casts for module in linears(stage).values()})
    with stock_wrappers():
        naive = phases(config, naive=True, short=True)
    for part in ("prelude", "core", "coda"):
        chosen = {p: {n: g for n, g in unfused[p].items() if f".{part}." in n} for p in unfused}
        found[f"naive, {part}"] = worst(naive, chosen)
    return found


def context() -> dict[str, Any]:
    """Compare two ranks that share each sequence with two that process the same sequences."""
    layers_te.TEDotProductAttention.cp_stream = "none: a stream is a GPU's"
    asked = [configure(world_size=2, bf16=True, **settings) for settings in CONTEXT]
    # In float32, which the real kernels don't support, so that the sums can be compared closely.
    each, shared = (replace(config, training=replace(config.training, bf16=False)) for config in asked)
    found = []
    for config in (each, shared):
        parallel_state.destroy_model_parallel()
        with model_parallel_groups(config):
            stage = build_stage(config)
            randomise(stage.modules[0])
            totals = run_batch(stage, batches(1), config.training, forward_only=True)
            found.append((loss_per_token(totals), train_step(stage, config, 1)))
    (loss, expected), (ours, gradients) = found
    errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
    return {"losses": [loss, ours], "errors": errors}


def casts() -> dict[str, Any]:
    """Count the casts of each weight in a step, by settings and part of the model."""
    found: dict[str, Any] = {}
    for label, settings in {
        "core": {},
        "all": {"fp8_scope": "all"},
        "all, recompute": {"fp8_scope": "all", "recompute_granularity": "full"},
        "all, mlp recompute": {
            "fp8_scope": "all",
            "recompute_granularity": "selective",
            "recompute_modules": ["mlp"],
        },
        "blockwise": {"fp8_recipe": "blockwise"},
        "ends": {"layers": "2+1R2+2", "fp8_scope": "all", "first_last_layers_bf16": True},
    }.items():
        config = configure(**{"gradient_accumulation_fusion": True, **FP8, **settings})
        stage = build_stage(config)
        train_step(stage, config, 1)
        before = {name: module.casts for name, module in linears(stage).items()}
        train_step(stage, config, 2)
        layers: dict[str, set[int]] = {}
        for name, module in linears(stage).items():
            part, layer = name.split(".")[1], name.split(".")[3]
            layers.setdefault(f"{part}.{layer}", set()).add(module.casts - before[name])
        found[label] = {name: sorted(counts) for name, counts in layers.items()}
    return found


def contexts() -> dict[str, list[bool]]:
    """Whether FP8 was enabled while the recurrence, the core, the coda and the last norm ran."""
    config = configure(**FP8)
    stage = build_stage(config)
    block = stage.modules[0].decoder
    seen: dict[str, list[bool]] = {}
    for name, module in (
        ("recurrence", block.recurrence),
        ("core", block.core.layers[0]),
        ("coda", block.coda.layers[0]),
        ("norm", block.final_layernorm),
    ):
        states = seen.setdefault(name, [])
        module.register_forward_pre_hook(
            lambda *a, states=states: states.append(FP8GlobalStateManager.is_fp8_enabled())
        )
    train_step(stage, config, 1)
    return seen


def marks() -> list[list[str]]:
    """The parts of the model that each chunk of a ring marks in a step's first micro-batch."""
    model = build_stage(configure("1+1R3+1", fp8_scope="all", **FP8)).modules[0]
    found = []
    for chunk in ring_chunks(model):
        for module in model.modules():
            if hasattr(module, "is_first_microbatch"):
                module.is_first_microbatch = False
        chunk.set_is_first_microbatch()
        names = [n for n, m in model.named_modules() if getattr(m, "is_first_microbatch", False)]
        found.append(sorted({name.split(".")[1] for name in names}))
    return found


def marked() -> dict[str, dict[str, Any]]:
    """The dimension along which tensor-parallel ranks shard each weight, by implementation and name."""
    return {
        name: {
            n: getattr(p, "partition_dim", None) if getattr(p, "tensor_model_parallel", False) else None
            for n, p in build_stage(configure(transformer_impl=name)).modules[0].named_parameters()
        }
        for name in ("local", "transformer_engine")
    }


def history() -> list[dict[str, Any]]:
    """Delayed scaling: the value each scale covers after a micro-batch, and each pass's largest input."""
    config = configure("1+4R2+1", global_batch_size=2, fp8_recipe="delayed", fp8_amax_history_len=1, **FP8)
    stage = build_stage(config)
    found: list[dict[str, Any]] = []
    for layer in stage.modules[0].decoder.core.layers:
        for module in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
            found.append({"largest": [], "module": module})
            module.register_forward_pre_hook(
                lambda m, x, largest=found[-1]["largest"]: largest.append(x[0].abs().max().item())
            )
    train_step(stage, config, 1)
    for entry in found:
        module = entry.pop("module")
        covered = FP8_MAX / module.history.scale[0].item()
        entry |= {"rows": len(module.history.amax_history), "covered": covered, "flags": module.flags}
    return found


def saved(stage: Stage, directory: Path) -> Index:
    """A checkpoint of a stage without an optimizer."""
    path = directory / "saved"
    write(path, Content(stage, None).to_write(), "", describe_state({}))
    return open_index(path)


def checkpoints() -> dict[str, Any]:
    """Losses of a model of each implementation, and of the other implementation from its checkpoint."""
    found: dict[str, Any] = {}
    stages = {
        name: build_stage(configure(transformer_impl=name, seed=seed))
        for seed, name in enumerate(("local", "transformer_engine"))
    }
    for source, target in (("local", "transformer_engine"), ("transformer_engine", "local")):
        stage, config = stages[source], configure(transformer_impl=target, seed=7)
        loaded = build_stage(config)
        with tempfile.TemporaryDirectory() as path:
            index = saved(stage, Path(path))
            assert load_tensors(index, loaded, None) == ""
        totals = [
            run_batch(s, batches(5), config.training, forward_only=True)[0].item() for s in (stage, loaded)
        ]
        found[f"{source} to {target}"] = {"losses": totals, "keys": sorted(index.entries)}
    return found


def delayed() -> dict[str, Any]:
    """Delayed scaling: compare gradients after a resume, with and without its state, with a run in one go."""
    config = configure("1+1R2+1", fp8_recipe="delayed", fp8_amax_history_len=3, **FP8)
    stage = build_stage(config)
    for step in (1, 2):
        train_step(stage, config, step)
    with tempfile.TemporaryDirectory() as path:
        index = saved(stage, Path(path))
        states = [key for key in index.entries if "scale" in key or "amax_history" in key]
        expected = train_step(stage, config, 3)
        found = {}
        for label in ("kept", "left out"):
            resumed = build_stage(config)
            given = index
            if label == "left out":
                entries = {key: entry for key, entry in index.entries.items() if key not in states}
                given = replace(index, entries=entries)
            assert load_tensors(given, resumed, None) == ""
            kept = fp8_state.to_save(resumed.sharded_state_dict(), resumed.config)
            found[f"saved again, {label}"] = len(kept) / len(states)
            again = train_step(resumed, config, 3)
            found[label] = max(relative_error(again[name], expected[name]) for name in expected)
        longer = build_stage(replace(config, precision=replace(config.precision, fp8_amax_history_len=4)))
        wanted = fp8_state.to_fill(longer.sharded_state_dict(), index, longer.config)
    return {"errors": found, "keys": sorted(states), "of another length": len(wanted)}


def attention() -> dict[str, Any]:
    """Classes of the attention in Transformer Engine's layers, and the loss, with its own and torch's."""
    found: dict[str, Any] = {}
    for name in ("auto", "local"):
        config = configure(transformer_impl="transformer_engine", attention_backend=name)
        stage = build_stage(config)
        layers = stage.modules[0].decoder.layers
        classes = {type(layer.self_attention.core_attention).__name__ for layer in layers}
        loss = run_batch(stage, batches(1), config.training, forward_only=True)[0].item()
        found[name] = {"classes": sorted(classes), "loss": loss}
    return found


def main() -> None:
    """Print the results of the functions above as one JSON object, alone or as one of two ranks."""
    if sys.argv[1:]:
        with one_process(configure(world_size=2, pipeline_model_parallel_size=2)):
            json.dump({function.__name__: function() for function in (ring, context)}, sys.stdout)
        return
    wanted = [casts, contexts, marks, marked, history, delayed, checkpoints, attention]
    with one_process(configure()):
        found = {"gradients": gradients(ALWAYS_CAST)}
        json.dump(found | {function.__name__: function() for function in wanted}, sys.stdout)


if __name__ == "__main__":
    main()
