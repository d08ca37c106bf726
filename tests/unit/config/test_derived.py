import pytest

from megatron_mesh.config.layout import LayerLayout, layout, padded_vocab_size
from megatron_mesh.config.resolve.model import resolve_model
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.config.sizes import non_embedding_parameters
from megatron_mesh.errors import UserError


def _model(recurrence: str, layers: str, **settings: int) -> ModelConfig:
    return resolve_model(ModelConfig(recurrence=recurrence, layers=layers, **settings))


@pytest.mark.parametrize(
    ("recurrence", "layers", "parameters"),
    [
        ("vanilla", "4+8R2+4", 1_208_602_624),  # these three: the paper's 1.4B models
        ("base", "4+8R2+4", 805_736_448),
        ("mesh", "4+8R2+4", 805_797_918),
        ("vanilla+mesh", "4+8+8+4", 1_208_602_624 + 61_470),
        ("static", "4+8R2+4", 805_736_448 + 2 * 3),
        ("dynamic", "4+8R2+4", 805_736_448 + 2 * 3 * 2049),
    ],
)
def test_parameters_of_the_1_4b_models(recurrence: str, layers: str, parameters: int) -> None:
    model = _model(recurrence, layers, hidden_size=2048, num_attention_heads=16)
    assert non_embedding_parameters(model) == parameters


def test_parameters_with_another_mlp() -> None:
    wide, usual = (
        _model("base", "1+1R2+1", hidden_size=64, num_attention_heads=4, **ffn)
        for ffn in ({"ffn_hidden_size": 257}, {})
    )
    # one more column of the first matrix, one more bias, one more row of the second, in three blocks
    assert non_embedding_parameters(wide) - non_embedding_parameters(usual) == 3 * (64 + 1 + 64)


@pytest.mark.parametrize(
    ("vocabulary", "multiple", "padded"),
    [(50277, 128, 50304), (128, 128, 128), (129, 128, 256), (1, 128, 128), (7, 1, 7)],
)
def test_padded_vocabulary(vocabulary: int, multiple: int, padded: int) -> None:
    model = ModelConfig(vocab_size=vocabulary, make_vocab_size_divisible_by=multiple)
    assert padded_vocab_size(model) == padded


def test_padding_needs_a_vocabulary() -> None:
    with pytest.raises(UserError, match="--tokenizer-model"):
        padded_vocab_size(ModelConfig())


def test_layout_of_a_resolved_model() -> None:
    assert layout(_model("vanilla+mesh", "4+8R2+4")) == LayerLayout(4, 8, 2, 4, shared=False)
    assert layout(_model("vanilla", "4+8R2+4")) == LayerLayout(0, 24, 1, 0, shared=False)
