"""The table of what a setting means that differs from the checkpoint's."""

from megatron_mesh.config import resuming
from megatron_mesh.config.resuming import RESUMING, Kind
from megatron_mesh.config.settings import SETTINGS


def test_every_setting_has_one_rule() -> None:
    assert RESUMING.keys() == SETTINGS.keys()
    tables = (resuming._WEIGHTS, resuming._SCHEDULE, resuming._NAMED, resuming._FREE)
    listed = [name for table in tables for name in table]
    assert len(listed) == len(set(listed))
    data = {"data_path", "train_data_path", "split", "seed", "valid_data_path", "test_data_path"}
    assert {*listed, "bf16", "tokenizer_model", "tokenizer_type"} | data == SETTINGS.keys()


def test_what_is_named_says_what_it_means() -> None:
    assert all(bool(rule.meaning) == (rule.kind is Kind.NAMED) for rule in RESUMING.values())
