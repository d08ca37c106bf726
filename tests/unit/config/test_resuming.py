"""The rules for settings that differ from the checkpoint's."""

import pytest

from megatron_mesh.config import resuming
from megatron_mesh.config.resolve.model import resolve_model
from megatron_mesh.config.resuming import RESUMING, Kind, differing
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.config.settings import SETTINGS


def test_every_setting_has_one_rule() -> None:
    assert RESUMING.keys() == SETTINGS.keys()
    tables = (resuming._WEIGHTS, resuming._SCHEDULE, resuming._REPORTED, resuming._FREE)
    listed = [name for table in tables for name in table]
    assert len(listed) == len(set(listed))
    data = {"data_path", "train_data_path", "split", "seed", "valid_data_path", "test_data_path"}
    assert {*listed, "bf16", "tokenizer_model", "tokenizer_type"} | data == SETTINGS.keys()


def test_reported_settings_have_a_consequence() -> None:
    assert all(bool(rule.consequence) == (rule.kind is Kind.REPORTED) for rule in RESUMING.values())


@pytest.mark.parametrize(
    ("layers", "same"), [("24", True), ("4+8R2+4", True), ("4+8+8+4", True), ("23", False)]
)
def test_a_plain_model_is_its_depth(layers: str, same: bool) -> None:
    """Checkpoints of earlier versions have 4+8+8+4 where 4+8R2+4 is resolved to 24 today."""
    saved = Config(model=ModelConfig(recurrence="vanilla", layers="4+8+8+4"))
    ours = Config(model=resolve_model(ModelConfig(recurrence="vanilla", layers=layers)))
    saved.model.ffn_hidden_size = ours.model.ffn_hidden_size
    assert differing(saved, ours, Kind.WEIGHTS) == ([] if same else ["layers"])


def test_layers_of_a_looped_model_are_compared_as_written() -> None:
    saved, ours = (
        Config(model=ModelConfig(recurrence="vanilla+mesh", layers=layers))
        for layers in ("4+8+8+4", "4+6+6+8")
    )
    assert differing(saved, ours, Kind.WEIGHTS) == ["layers"]
