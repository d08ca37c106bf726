"""A fixture that exports models of any kind, each kind once in a test session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mesh.hf.convert.export import export_checkpoint
from tests.exports import saved_with_logits


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path, torch.Tensor]]:
    """``exported(**model)`` returns a checkpoint, its export, and Megatron's logits without padded ids."""
    known: dict[str, tuple[Path, Path, torch.Tensor]] = {}

    def get(**model: Any) -> tuple[Path, Path, torch.Tensor]:
        key = str(sorted(model.items()))
        if key not in known:
            directory = tmp_path_factory.mktemp("exported")
            checkpoint, logits = saved_with_logits(directory / "run", **model)
            export_checkpoint(checkpoint, directory / "hf")
            known[key] = checkpoint, directory / "hf", logits
        return known[key]

    return get
