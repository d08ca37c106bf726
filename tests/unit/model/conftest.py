"""Set up a world of one process, once for the tests of each module."""

import pytest
import torch

from megatron_mesh.config.schema import Config
from megatron_mesh.runtime.distributed import process_groups


@pytest.fixture(scope="module", autouse=True)
def groups():
    torch.set_num_threads(1)
    with process_groups(Config()):
        yield
