"""When the watchdog counts a rank as hung; tests/parallel/test_health.py ends whole jobs with it."""

import math
from types import SimpleNamespace

import pytest

from megatron_mesh.runtime import health as module
from megatron_mesh.runtime.failures import Failures
from megatron_mesh.runtime.health import Health


def test_a_rank_is_overdue_after_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    health = Health(0, 1, Failures())
    assert health.overdue(60, now=160.0) == 0
    assert health.overdue(60, now=161.0) == 61
    now = 150.0
    health.beat("step 1")
    assert health.overdue(60, now=210.0) == 0


@pytest.mark.parametrize(("minutes", "overdue"), [(math.inf, 0), (6, 0), (5, 301), (0.5, 301)])
def test_busy_work_has_its_own_limit(minutes: float, overdue: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    health = Health(0, 1, Failures())
    with health.busy("a save", minutes):
        assert health.overdue(60, now=301.0) == overdue
        now = 301.0
    assert health.overdue(60, now=361.0) == 0  # the watchdog's own limit again, from the end of the save
    assert health.overdue(60, now=362.0) == 61
