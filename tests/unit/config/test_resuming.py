"""The table of what a setting means that differs from the checkpoint's."""

from megatron_mesh.config import resuming
from megatron_mesh.config.resuming import RESUMING, Kind
from megatron_mesh.config.settings import SETTINGS


def test_every_setting_has_one_rule() -> None:
    assert RESUMING.keys() == SETTINGS.keys()
    tables = (resuming._WEIGHTS, ("bf16",), resuming._SCHEDULE, resuming._NAMED, resuming._FREE)
    named = [name for table in tables for name in table] + ["data_path", "train_data_path", "split", "seed"]
    assert len(named) == len(set(named))
    grouped = {name for name, setting in SETTINGS.items() if setting.group in resuming._FREE_GROUPS}
    assert not grouped & set(named)
    assert grouped | set(named) == SETTINGS.keys()


def test_what_is_named_says_what_it_means() -> None:
    assert all(bool(rule.meaning) == (rule.kind is Kind.NAMED) for rule in RESUMING.values())
