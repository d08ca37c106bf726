"""Test initial weights: their distribution, and that they depend only on the seed."""

import torch

from megatron_mesh.model import build_model
from megatron_mesh.model.build import init_weights
from tests.helpers import tiny_config


def test_every_parameter_is_set_from_the_seed_alone() -> None:
    config = tiny_config("mesh")
    model = build_model(config)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    torch.manual_seed(99)  # the global generator must not matter
    init_weights(model, config.training.seed)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    init_weights(model, config.training.seed + 1)
    assert not torch.equal(model.output_layer.weight, expected["output_layer.weight"])


def test_no_two_parameters_have_the_same_values() -> None:
    """Not even those of one shape, in a layer or in neighbouring layers."""
    parameters = dict(build_model(tiny_config("mesh")).named_parameters())
    drawn = {name: tuple(p.flatten()[:8].tolist()) for name, p in parameters.items() if p.std() > 0}
    assert len(drawn) > 10 and len(set(drawn.values())) == len(drawn)


def test_standard_deviations() -> None:
    config = tiny_config("mesh", "1+2R2+1", hidden_size=256, init_method_std=0.05, router_init_std=0.3)
    model = build_model(config)
    layer = model.decoder.core.layers[0]
    depth = 1 + 2 * 2 + 1
    for weight, std in (
        (model.embedding.word_embeddings.weight, 0.05),
        (model.output_layer.weight, 0.05),
        (layer.self_attention.linear_qkv.weight, 0.05),
        (layer.mlp.linear_fc1.weight, 0.05),
        (layer.self_attention.linear_proj.weight, 0.05 / (2 * depth) ** 0.5),
        (layer.mlp.linear_fc2.weight, 0.05 / (2 * depth) ** 0.5),
        (model.decoder.recurrence.write[0].weight, 0.3),
    ):
        assert abs(weight.std().item() / std - 1) < 0.06
        assert abs(weight.mean().item()) < 0.1 * std
    assert not torch.equal(model.decoder.recurrence.write[0].weight, model.decoder.recurrence.read[0].weight)
    assert layer.mlp.linear_fc1.bias.abs().max() == 0
    assert torch.equal(model.decoder.final_layernorm.weight, torch.ones(256))


def test_depth_scaling_and_embedding_scaling_can_be_switched_off() -> None:
    config = tiny_config("base", hidden_size=256, depth_scaled_init=False, scale_embeddings=False)
    model = build_model(config)
    assert abs(model.decoder.coda.layers[0].mlp.linear_fc2.weight.std().item() / 0.02 - 1) < 0.06
    assert model.config.embedding_scale == 1.0
    assert build_model(tiny_config("base", hidden_size=256)).config.embedding_scale == 16.0
