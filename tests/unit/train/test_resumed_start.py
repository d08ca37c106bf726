"""A resumed run computes no initial weights, since the checkpoint would replace them."""

import pytest
import torch

from megatron_mesh.checkpoint.load import Search
from megatron_mesh.model import build
from megatron_mesh.parallel import build_stage
from megatron_mesh.runtime.device import pack_generators
from megatron_mesh.runtime.distributed import process_groups
from megatron_mesh.train.loop import build_run
from tests.unit.train.conftest import run


@pytest.fixture
def nothing_is_drawn(monkeypatch):
    """Fails if an initial weight is drawn, by us or by one of torch's modules."""

    def drawn(*args, **kwargs):
        pytest.fail("an initial weight is drawn")

    def start() -> None:
        monkeypatch.setattr(build, "drawn", drawn)
        monkeypatch.setattr(torch.Tensor, "normal_", drawn)
        monkeypatch.setattr(torch.Tensor, "uniform_", drawn)

    return start


@pytest.mark.parametrize("recurrence", ["mesh", "dynamic", "vanilla"])
def test_a_resumed_run_draws_nothing(tiny, tmp_path, nothing_is_drawn, recurrence) -> None:
    layers = "4" if recurrence == "vanilla" else "1+1R2+1"
    saved = run(tiny(recurrence, layers, save=str(tmp_path), train_iters=2, lr_decay_iters=6))
    config = tiny(recurrence, layers, load=str(tmp_path), save=str(tmp_path))
    with process_groups(config):
        nothing_is_drawn()
        parts = build_run(config, Search(config.checkpoint))
        found = dict(parts.stage.modules[0].named_parameters())
        assert found.keys() == saved.weights.keys()
        for name, weight in saved.weights.items():
            assert torch.equal(found[name], weight), name
        assert torch.equal(pack_generators(), saved.rng)


@pytest.mark.parametrize("initial_weights", [True, False])
def test_building_does_not_change_the_generators(tiny, initial_weights) -> None:
    """New or resumed, on any layout, a run has the random number generators that its seed gives."""
    config = tiny()
    with process_groups(config):
        before = pack_generators()
        stage = build_stage(config, initial_weights=initial_weights)
        assert torch.equal(pack_generators(), before)
        zero = all(not parameter.any() for parameter in stage.modules[0].parameters())
        assert zero == (not initial_weights)
