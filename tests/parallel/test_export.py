"""Checkpoints of many ranks are converted as those of one are."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_mesh.hf.export import export_checkpoint
from megatron_mesh.runtime.distributed import model_parallel_groups
from tests.exports import TOKENS, export_config, saved_with_logits
from tests.helpers import relative_error
from tests.parallel.pool import pool


def save(directory: Path, settings: dict, source: Path) -> None:
    """Load the weights of ``source`` on this layout and save them from it; in workers."""
    from megatron_mesh.checkpoint import safe
    from megatron_mesh.checkpoint.content import sharded_state
    from megatron_mesh.checkpoint.save import Saver
    from megatron_mesh.checkpoint.state import TrainState
    from megatron_mesh.parallel import build_stage
    from megatron_mesh.train.optimizer import build_optimizer, build_schedule

    config = export_config(directory, world_size=4, **settings)
    with model_parallel_groups(config):
        stage = build_stage(config)
        optimizer = build_optimizer(config, stage)
        wanted = sharded_state(stage, None, with_generators=False, checkpoint=source)
        stage.load_state_dict(safe.load(wanted, source)["model"])
        state = TrainState(build_schedule(config.optimizer, optimizer), step=3)
        Saver(config).save(stage, optimizer, state)


@pytest.mark.parametrize(
    ("scheme", "layers", "tied"),
    [
        ("mesh", "2+3R2+1", False),
        ("mesh", "1+2R3+1", True),
        ("vanilla", "4", False),
        ("vanilla+mesh", "1+2+2+1", False),
    ],
)
def test_from_tensor_and_pipeline_parallel_ranks(tmp_path, scheme, layers, tied) -> None:
    model = {"recurrence": scheme, "layers": layers, "untie_embeddings_and_output_weights": not tied}
    source, logits = saved_with_logits(tmp_path / "one", **model)
    ranks = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    pool(4).run(save, tmp_path / "many", {**model, **ranks}, source)
    export_checkpoint(tmp_path / "many", tmp_path / "hf")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(ours(TOKENS).logits, logits) < 1e-5
