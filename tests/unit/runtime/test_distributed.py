"""A run raises the limit of open files."""

import os
import resource

import pytest

from megatron_mesh.runtime import distributed
from tests.helpers import one_process, tiny_config


@pytest.mark.parametrize("more", [50, 10**9])
def test_a_run_raises_the_limit_of_open_files_as_far_as_allowed(monkeypatch, more: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Earlier tests in this process may have left files open. The groups need about a hundred more.
    enough = max(map(int, os.listdir("/proc/self/fd"))) + 200
    monkeypatch.setattr(distributed, "OPEN_FILES", enough + more)
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
    try:
        with one_process(tiny_config()):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, enough + more), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
