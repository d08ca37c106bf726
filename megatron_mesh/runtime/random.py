"""Save and restore the states of all random number generators of a process, as one tensor."""

import io
import math
import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from megatron_mesh.runtime import device


def pack_generators() -> torch.Tensor:
    """Pack the states of Python's, NumPy's, torch's and Megatron's generators into a uint8 tensor.

    The tensor has the same length on all ranks of a run.
    """
    python_version, python_state, gauss = random.getstate()
    name, keys, position, has_gauss, cached_gauss = np.random.get_state()
    assert name == "MT19937"
    arrays: dict[str, Any] = {
        "python": np.array([python_version, *python_state], dtype=np.uint64),
        "python_gauss": np.array(math.nan if gauss is None else gauss),
        "numpy": keys,
        "numpy_position": np.array([position, has_gauss]),
        "numpy_gauss": np.array(cached_gauss),
    }
    arrays |= {f"torch/{name}": state.numpy() for name, state in device.rng_state().items()}
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    arrays |= {f"tracker/{name}": state.numpy() for name, state in tracker.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpack_generators(packed: torch.Tensor) -> None:
    """Restore the states from ``pack_generators``."""
    with np.load(io.BytesIO(packed.numpy().tobytes()), allow_pickle=False) as arrays:
        version, *state = arrays["python"].tolist()
        gauss = float(arrays["python_gauss"])
        random.setstate((version, tuple(state), None if math.isnan(gauss) else gauss))
        position, has_gauss = arrays["numpy_position"].tolist()
        np.random.set_state(("MT19937", arrays["numpy"], position, has_gauss, float(arrays["numpy_gauss"])))
        tensors = {name: torch.from_numpy(arrays[name].copy()) for name in arrays.files if "/" in name}
    device.set_rng_state(_below("torch/", tensors))
    tensor_parallel.get_cuda_rng_tracker().set_states(_below("tracker/", tensors))


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
