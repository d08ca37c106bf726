"""What all tests on a GPU need."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _whole_float32() -> Iterator[None]:
    """float32 means float32: NVIDIA's image has matrix products in TF32, with 10 bits, by this variable."""
    before = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0")  # for processes that tests start
        torch.set_float32_matmul_precision("highest")
        yield
    torch.set_float32_matmul_precision(before)
