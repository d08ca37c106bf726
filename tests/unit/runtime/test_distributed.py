"""What a process asks of the system before it meets the others."""

import os
import resource

import pytest

from megatron_mesh.runtime import distributed
from tests.helpers import one_process, tiny_config


@pytest.mark.parametrize("more", [50, 10**9])
def test_a_run_may_open_as_many_files_as_the_system_lets_it(monkeypatch, more: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Tests that ran before in this process may have left many files open; the groups need about a hundred.
    enough = max(map(int, os.listdir("/proc/self/fd"))) + 200
    monkeypatch.setattr(distributed, "OPEN_FILES", enough + more)
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
    try:
        with one_process(tiny_config()):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, enough + more), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
