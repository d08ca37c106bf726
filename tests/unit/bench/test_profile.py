"""Traces name the ranges of a step: its parts, passes and cycles."""

import json
from collections import Counter
from pathlib import Path

import torch

from megatron_mesh.runtime import profiling
from tests.helpers import one_process
from tools.bench.measure import write_traces
from tools.bench.settings import StepSettings
from tools.bench.variants import batches_of, build_variant, variant_config

TOY = StepSettings(
    layers="1+1R2+1",
    hidden_size=32,
    num_attention_heads=2,
    vocab_size=128,
    seq_length=16,
    micro_batch_size=2,
    num_micro_batches=2,
    bf16=False,
)


def test_passes_and_cycles_are_named_in_the_trace(tmp_path: Path) -> None:
    config = variant_config(TOY, "mesh")
    with one_process(config):
        variant = build_variant("mesh", config)
        (path,) = write_traces([variant], batches_of(TOY), tmp_path / "traces")
    assert path == tmp_path / "traces" / "mesh.json"
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "user_annotation"]
    counts = Counter(event["name"] for event in events)
    once = ("clear", "forward-backward", "communication", "agreement", "update")
    assert {name: counts[name] for name in once} == dict.fromkeys(once, 1)
    passes = ("pass 0: prelude", "pass 1: core", "pass 2: core", "pass 3: coda")
    inside = (*passes, "store embedding", "cycle 0", "cycle 1", "cycle 2")
    assert {name: counts[name] for name in inside} == dict.fromkeys(inside, TOY.num_micro_batches)
    spans = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events}
    for cycle, pass_name in zip(("cycle 0", "cycle 1", "cycle 2"), passes[1:], strict=True):
        (start, end), (outer_start, outer_end) = spans[cycle], spans[pass_name]
        assert outer_start <= start < end <= outer_end


def test_ranges_are_marked_only_on_request() -> None:
    def names() -> set[str]:
        with torch.profiler.profile() as profiler, profiling.named("here"):
            torch.ones(2).sum()
        return {event.key for event in profiler.key_averages()}

    assert "here" not in names()
    with profiling.marking():
        assert "here" in names()
    assert "here" not in names()
