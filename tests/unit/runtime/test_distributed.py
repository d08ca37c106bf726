"""What a process asks of the system before it meets the others."""

import resource

import pytest

from megatron_mesh.runtime import distributed
from tests.helpers import one_process, tiny_config


@pytest.mark.parametrize("wanted, limit", [(300, 300), (10**9, None)])
def test_a_run_may_open_as_many_files_as_the_system_lets_it(
    monkeypatch, wanted: int, limit: int | None
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(distributed, "OPEN_FILES", wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with one_process(tiny_config()):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limit or hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
