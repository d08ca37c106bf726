"""Setup for all tests on a GPU."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _full_float32() -> Iterator[None]:
    """Compute float32 in full precision. NVIDIA's image sets this variable to use TF32, which has 10 bits."""
    before = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0")  # inherited by processes that tests start
        torch.set_float32_matmul_precision("highest")
        yield
    torch.set_float32_matmul_precision(before)
