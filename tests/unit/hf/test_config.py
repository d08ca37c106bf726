"""Models whose configuration changes, fresh models, and recorded hidden states and attentions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_mesh.recurrence import SCHEMES as CLASSES
from megatron_mesh.recurrence import RecurrenceOptions, build_scheme
from tests.helpers import relative_error
from tests.unit.hf.models import IDS, ROUTED, SCHEMES, greedy, looped, unrolled_twin

pytestmark = pytest.mark.versions
ADDITIVE = [name for name, kind in CLASSES.items() if kind.shared_core and name not in ROUTED]
LAYERS = {"vanilla+mesh": "1+2+2+1"}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("change", ["num_loops", "num_hidden_layers", "core_layers"])
def test_a_config_that_changes_under_a_model(scheme, change) -> None:
    """Forward and generate fail, with and without a cache, until the config is restored."""
    model = looped(scheme)
    before = getattr(model.config, change), model.config.num_hidden_layers
    for value in (1, 3, 7):
        setattr(model.config, change, value)
        for options in ({"use_cache": False}, {"use_cache": True}):
            with pytest.raises(ValueError, match=r"config was changed .* call model\.set_num_loops"):
                model(IDS, **options)
        with pytest.raises(ValueError, match="config was changed"):
            greedy(model)
    setattr(model.config, change, before[0])
    model.config.num_hidden_layers = before[1]
    assert relative_error(model(IDS).logits, looped(scheme)(IDS).logits) == 0.0


@pytest.mark.parametrize("scheme", ADDITIVE)
def test_other_numbers_of_loops(tmp_path, scheme) -> None:
    """Like a model that is built with that number: caches, recorded states, and saving."""
    model = looped(scheme)
    model(IDS, output_hidden_states=True)  # makes transformers 5 hook into the present modules
    for loops in (3, 1):
        model.set_num_loops(loops)
        other = looped(scheme, num_loops=loops)
        assert torch.equal(model(IDS).logits, other(IDS).logits)
        assert torch.equal(greedy(model), greedy(other, use_cache=False))
        recorded, expected = (m(IDS, output_hidden_states=True).hidden_states for m in (model, other))
        assert len(recorded) == len(expected) == 2 + 2 * loops + 1
        assert all(torch.equal(a, b) for a, b in zip(recorded, expected, strict=True))
        model.save_pretrained(tmp_path / str(loops))
        again = type(model).from_pretrained(tmp_path / str(loops))
        assert again.config.num_loops == loops and torch.equal(again(IDS).logits, other(IDS).logits)


def test_hidden_states_and_attentions_of_a_stock_model() -> None:
    model = looped("base", attn_implementation="eager")
    twin = unrolled_twin(model)
    twin.set_attn_implementation("eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    ours, theirs = model(IDS, **options), twin(IDS, **options)
    for name, count in (("hidden_states", 7), ("attentions", 6)):
        assert len(ours[name]) == len(theirs[name]) == count
        for one, other in zip(ours[name], theirs[name], strict=True):
            assert relative_error(one, other) < 1e-5, name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hidden_states_are_what_hooks_see(scheme) -> None:
    """For hooks on the modules that the model card names."""
    model = looped(scheme, attn_implementation="eager")
    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    for place in range(model.config.num_hidden_layers):
        layer = model.get_submodule(f"model.unrolled.{place}")
        attention = model.get_submodule(f"model.unrolled.{place}.attention")
        assert attention.layer_idx == place

        def saw(module: Any, inputs: Any, output: Any, place: int = place) -> None:
            entered[place], left[place] = inputs[0], output

        def attended(module: Any, inputs: Any, output: Any, place: int = place) -> None:
            weights[place] = output[1]

        layer.register_forward_hook(saw)
        attention.register_forward_hook(attended)
    out = model(IDS, output_hidden_states=True, output_attentions=True)
    states = out.hidden_states
    assert len(states) == 7 and len(out.attentions) == 6
    assert torch.equal(states[0], entered[0])
    for place in range(5):
        assert torch.equal(states[place + 1], left[place])
    assert torch.equal(states[6], model.model.final_layer_norm(left[5]))
    assert torch.equal(model.lm_head(states[-1]), out.logits)
    for place in range(6):
        assert torch.equal(out.attentions[place], weights[place])
        assert relative_error(weights[place].sum(-1), torch.ones(2, 2, 8)) < 1e-5
    if scheme in ("mesh", "vanilla+mesh", "static"):
        assert not torch.allclose(states[3], entered[3])  # the recurrence mixes states between passes
    assert torch.equal(states[2], entered[2])  # but not within a pass


@pytest.mark.parametrize("scheme", SCHEMES)
def test_routers_of_fresh_models(exported, tmp_path, scheme) -> None:
    """They are initialized as in pretraining, in a new model and if only the routers weren't loaded."""
    directory = exported(recurrence=scheme, layers=LAYERS.get(scheme, "1+2R2+1"), hidden_size=128)[1]
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True, initializer_range=0.05)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    _check_routers(fresh.model.recurrence, scheme, config)
    assert float(fresh.model.prelude[0].mlp.dense_h_to_4h.weight.std()) == pytest.approx(0.05, rel=0.1)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    without = {name: t for name, t in model.state_dict().items() if "recurrence" not in name}
    model.save_pretrained(tmp_path / "lacking", state_dict=without)
    lacking, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "lacking", trust_remote_code=True, output_loading_info=True, initializer_range=0.05
    )
    assert set(info["missing_keys"]) == {
        f"model.recurrence.{name}" for name in model.model.recurrence.state_dict()
    }
    _check_routers(lacking.model.recurrence, scheme, config)
    assert all(torch.equal(lacking.state_dict()[name], tensor) for name, tensor in without.items())


def test_a_router_that_is_missing_leaves_the_others(exported, tmp_path) -> None:
    directory = exported(recurrence="dynamic", layers="1+2R2+1")[1]
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    weights = model.state_dict()
    del weights["model.recurrence.maps.1.weight"]
    model.save_pretrained(tmp_path / "lacking", state_dict=weights)
    lacking = AutoModelForCausalLM.from_pretrained(tmp_path / "lacking", trust_remote_code=True)
    assert lacking.model.recurrence.maps[1].weight.abs().max() == 0
    assert all(torch.equal(lacking.state_dict()[name], tensor) for name, tensor in weights.items())


def _check_routers(recurrence: Any, scheme: str, config: Any) -> None:
    """Compare with the trainer's scheme: constants must be equal, random values equally distributed."""
    expected = build_scheme(
        scheme, config.hidden_size, config.num_loops, RecurrenceOptions(router_init_std=0.05)
    )
    with torch.no_grad():
        expected.init_parameters(lambda name, weight, std: weight.normal_(0.0, std))
    for name, parameter in expected.named_parameters():
        value = recurrence.get_parameter(name)
        if parameter.std() > 0 and "mesh" in scheme and name.endswith("weight"):
            assert float(value.std()) == pytest.approx(0.05, rel=0.15) and abs(float(value.mean())) < 0.01, (
                name
            )
        else:
            assert torch.equal(value, parameter), name
