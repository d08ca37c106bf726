"""The speed of a run: which time counts as that of its steps."""

from types import SimpleNamespace

from megatron_mesh.metrics import meters
from megatron_mesh.metrics.meters import SpeedMeter
from tests.helpers import one_process, tiny_config


def test_a_pause_does_not_count_as_a_step(monkeypatch) -> None:
    """Saves and evaluations take place between steps, and would make the steps look slow."""
    now = 0.0
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: now))
    config = tiny_config()
    with one_process(config):
        speed = SpeedMeter(config, step=10, consumed_samples=80)
        now = 6.0
        with speed.paused():
            now = 106.0
        now = 108.0
        read = speed.read(14, 112)
        assert (read["step_seconds"], read["tokens_per_second"]) == (2.0, 32 * 16 / 8)
        now = 111.0
        assert speed.read(15, 120)["step_seconds"] == 3.0  # a pause counts once
