"""Checkpoints saved by several ranks convert like those of one rank, and imports load on several ranks."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_mesh.hf.convert.export import export_checkpoint
from megatron_mesh.hf.convert.import_model import import_model
from megatron_mesh.recurrence import SCHEMES
from megatron_mesh.runtime.distributed import model_parallel_groups
from tests.exports import TOKENS, export_config, load_weights, saved_with_logits
from tests.helpers import relative_error
from tests.parallel.pool import pool


def save(directory: Path, settings: dict, source: Path) -> None:
    """Load the weights of ``source`` on this rank layout and save them. Runs in workers."""
    from megatron_mesh.checkpoint.content import TrainState
    from megatron_mesh.checkpoint.save import Saver
    from megatron_mesh.parallel import build_stage
    from megatron_mesh.train.optimizer import build_optimizer, build_schedule

    config = export_config(directory, world_size=4, **settings)
    with model_parallel_groups(config):
        stage = build_stage(config)
        optimizer = build_optimizer(config, stage)
        load_weights(stage, source, optimizer)
        state = TrainState(build_schedule(config.optimizer, optimizer), step=3)
        Saver(config).save(stage, optimizer, state)


RANKS = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
CASES = [
    ("mesh", "2+3R2+1", False),
    ("mesh", "1+2R3+1", True),
    ("vanilla", "4", False),
    ("vanilla+mesh", "1+2+2+1", False),
]
if os.environ.get("MESH_TEST_ALL"):
    looped = [name for name, scheme in SCHEMES.items() if scheme.has_loop and scheme.shared_core]
    CASES += [(name, f"1+2R{loops}+1", False) for name in looped for loops in (1, 2, 3)]


@pytest.mark.parametrize(("scheme", "layers", "tied"), CASES)
def test_from_tensor_and_pipeline_parallel_ranks(tmp_path, scheme, layers, tied) -> None:
    model = {"recurrence": scheme, "layers": layers, "untie_embeddings_and_output_weights": not tied}
    source, logits = saved_with_logits(tmp_path / "one", **model)
    pool(4).run(save, tmp_path / "many", {**model, **RANKS}, source)
    export_checkpoint(tmp_path / "many", tmp_path / "hf")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(ours(TOKENS).logits, logits) < 1e-5


def test_an_import_loads_on_tensor_and_pipeline_parallel_ranks(tmp_path) -> None:
    """Exporting it again gives the original."""
    model = {"recurrence": "mesh", "layers": "2+3R2+1"}
    source, _ = saved_with_logits(tmp_path / "one", **model)
    export_checkpoint(source, tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "imported")
    pool(4).run(save, tmp_path / "many", {**model, **RANKS}, tmp_path / "imported")
    export_checkpoint(tmp_path / "many", tmp_path / "again")
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("hf", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resized_vocabulary_is_split_over_tensor_parallel_ranks(tmp_path) -> None:
    """101 entries can't be divided between two ranks without padding; exporting them gives the original."""
    model = {"recurrence": "mesh", "layers": "2+3R2+1"}
    source, _ = saved_with_logits(tmp_path / "one", **model)
    export_checkpoint(source, tmp_path / "hf")
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    resized.resize_token_embeddings(101)
    resized.save_pretrained(tmp_path / "resized")
    settings = import_model(tmp_path / "resized", tmp_path / "imported")
    assert settings.vocab_size == 101
    pool(4).run(save, tmp_path / "many", {**model, **RANKS, "vocab_size": 101}, tmp_path / "imported")
    export_checkpoint(tmp_path / "many", tmp_path / "again")
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("resized", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name][: len(before[name])]) for name in before)
