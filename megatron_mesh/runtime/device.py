"""Choose this process's device, GPU or CPU, and hide the difference: no other file names CUDA.

Megatron-core 0.16.1 names CUDA in places that a CPU run reaches. Without a GPU, ``prepare`` makes those names
mean the CPU; ``CPU_PATCHES`` lists each of them. With a GPU it patches nothing. ``compat.uninstall`` undoes
it.

Save and restore the states of all random number generators of a process, as one tensor.
"""

import functools
import importlib.util
import io
import logging
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from megatron_mesh.compat import changes
from megatron_mesh.runtime.environment import local_rank_from_environment

logger = logging.getLogger(__name__)

# Patched name -> why Megatron-core 0.16.1 needs the patch on a CPU. tests/unit/runtime checks that each name
# exists.
CPU_PATCHES = {
    "torch.tensor": 'called with device="cuda" (optimizer, distributed data parallel)',
    "torch.zeros": 'called with device="cuda" (schedules, gradient buffers)',
    "torch.ones": 'called with device="cuda"',
    "torch.empty": 'called with device="cuda" (pipeline receive buffers)',
    "torch.empty_like": 'called with device="cuda"',
    "torch.cuda.current_device": "passed on as a device by layers, buffers and the optimizer",
    "torch.cuda.synchronize": "called by schedules and checkpoints",
    "torch.cuda.empty_cache": "called by checkpoints",
    "torch.cuda.manual_seed": "called by the RNG tracker; a CPU run has one generator",
    "torch.cuda.get_rng_state": "called by the RNG tracker",
    "torch.cuda.set_rng_state": "called by the RNG tracker",
    "torch.Tensor.cuda": "called on token counts and norms",
    "torch.Tensor.type": 'the optimizers compare the string with "torch.cuda.FloatTensor"',
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": "activation recomputation",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": "activation recomputation",
}

# Dense bf16 FLOP/s from the data sheets, by a part of the device's name; the first match counts.
_PEAK_BF16_FLOPS = {
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,  # GH200 too
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}

# Texts of out-of-memory errors that are not an OutOfMemoryError: those of torch's CPU allocator, of the CUDA
# runtime (when it loads a kernel late) and of cuBLAS. The last two bypass torch's allocator.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def prepare(local_rank: int | None = None) -> torch.device:
    """Choose this process's device. Call it before the first use of Megatron-core; a second call changes
    nothing.

    Args:
        local_rank: index of the process on its node (default: ``LOCAL_RANK`` or ``SLURM_LOCALID``).
    """
    # Up to Hopper, tensor parallelism overlaps its sends with a matrix product only if the device has a
    # single queue (Megatron-core's tensor_parallel/layers.py). CUDA reads this when it starts. A user's value
    # stays.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if has_gpu():
        if local_rank is None:
            local_rank = local_rank_from_environment()
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    else:
        changes.make("names of the GPU mean the CPU", _patch_for_cpu)
    return device()


def be_deterministic() -> None:
    """Allow only deterministic operations. Call it before the first operation.

    cuBLAS, NCCL and Transformer Engine read the variables when they start. Values that a user has set stay.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend for the device."""
    return "nccl" if has_gpu() else "gloo"


def describe() -> str:
    """Name the device and the optional packages that are missing, in one line."""
    optional = {"transformer_engine": "Transformer Engine", "apex": "apex"}
    missing = [label for name, label in optional.items() if importlib.util.find_spec(name) is None]
    where = torch.cuda.get_device_name() if has_gpu() else f"CPU, {torch.get_num_threads()} threads"
    if "Transformer Engine" not in missing:  # it replaces apex
        return where
    return f"{where} (not installed: {', '.join(missing)}; torch's own attention, norms and AdamW are used)"


def gpus() -> list[tuple[str, str]]:
    """Name and description (memory, compute capability) of each GPU that this process sees."""
    if not has_gpu():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        (each.name, f"{each.total_memory / 2**30:.0f} GiB, sm_{each.major}{each.minor}") for each in found
    ]


def why_no_gpu() -> str:
    """Explain why this process has no GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; training runs on the CPU, with gloo"
    return (
        "torch finds no GPU (check the driver and CUDA_VISIBLE_DEVICES); training runs on the CPU, with gloo"
    )


def why_no_fp8(recipe: str = "tensorwise") -> str | None:
    """Explain why this machine cannot multiply matrices in FP8; None if all its GPUs can.

    The limits are those of Transformer Engine 2.11 (``pytorch/quantization.py``).
    """
    if not has_gpu():
        return "there is no GPU"
    oldest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if oldest < (8, 9):
        return "the GPU (sm_{}{}) has no FP8; it needs sm_89 (Ada), sm_90 (Hopper) or newer".format(*oldest)
    if recipe != "blockwise":
        return None
    if oldest < (9, 0):
        return "the GPU (sm_{}{}) has no blockwise FP8; it needs sm_90 (Hopper) or newer".format(*oldest)
    cuda = str(torch.version.cuda)
    if tuple(map(int, cuda.split("."))) < (12, 9):
        return f"torch is built for CUDA {cuda}, and blockwise FP8 needs 12.9 or newer"
    return None


def libraries() -> dict[str, str]:
    """Versions of the GPU libraries that torch uses; empty on a CPU."""
    if not has_gpu():
        return {}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    try:
        cudnn = str(torch.backends.cudnn.version())
    except RuntimeError as error:  # another one was loaded than torch was built with
        cudnn = str(error).partition(". ")[0]
    return {"CUDA": str(torch.version.cuda), "cuDNN": cudnn, "NCCL": nccl}


def synchronize() -> None:
    """Wait for the device (nothing to wait for on a CPU)."""
    if has_gpu():
        torch.cuda.synchronize()


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to host memory. It isn't pinned: torch rounds pinned allocations up and never returns them."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def moment() -> Any:
    """Mark the moment when the device finishes the work queued so far, without waiting for it."""
    if not has_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds between two ``moment``s; waits until the device has reached ``end``."""
    if not has_gpu():
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_memory_bytes() -> int:
    """Peak memory so far: allocated on the GPU, or resident in the process."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def allocated_bytes() -> int | None:
    """GPU memory that tensors occupy now; None on a CPU, where torch doesn't count it."""
    return torch.cuda.memory_allocated() if has_gpu() else None


def allocation_retries() -> int:
    """How often the allocator has freed its cache and retried so far; 0 on a CPU."""
    return torch.cuda.memory_stats()["num_alloc_retries"] if has_gpu() else 0


def reset_peak_memory() -> None:
    """Restart the measurement of ``peak_memory_bytes``. No effect on a CPU."""
    if has_gpu():
        torch.cuda.reset_peak_memory_stats()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch raised ``error`` because GPU or host memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def peak_flops(fp8: bool = False) -> float | None:
    """Dense bf16 or FP8 FLOP/s by the data sheet; None if unknown, as for a CPU or a MIG slice."""
    if not has_gpu() or (fp8 and why_no_fp8()):
        return None
    name = torch.cuda.get_device_name()
    if " MIG " in name:
        return None
    bf16 = next((flops for part, flops in _PEAK_BF16_FLOPS.items() if part in name), None)
    return bf16 * 2 if bf16 and fp8 else bf16


@contextmanager
def marked(name: str) -> Iterator[None]:
    """Name the code inside in traces of torch's profiler and, on a GPU, as an NVTX range."""
    with torch.profiler.record_function(name):
        if not has_gpu():
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


def rng_state() -> dict[str, torch.Tensor]:
    """States of torch's random number generators in this process."""
    state = {"cpu": torch.get_rng_state()}
    if has_gpu():
        state["device"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore states from ``rng_state``. Without a GPU, the state of a GPU is ignored."""
    torch.set_rng_state(state["cpu"])
    if has_gpu() and "device" in state:
        torch.cuda.set_rng_state(state["device"])


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # there is no GPU to read it
        return factory(*args, **kwargs)

    return call


def _patch_for_cpu(stack: ExitStack) -> None:
    """Make the names in ``CPU_PATCHES`` mean the CPU. Process-wide, because torch's modes are per thread."""
    from megatron_mesh.compat import megatron_random, torch_internals

    torch_internals.cache_device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        changes.replace(stack, torch, name, _on_cpu(getattr(torch, name)))

    plain_type = torch.Tensor.type

    def type_as_on_gpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return plain_type(self, *args, **kwargs)
        return plain_type(self).replace("torch.", "torch.cuda.", 1)

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    replacements: list[tuple[Any, str, Callable]] = [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "synchronize", lambda *a, **k: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "manual_seed", torch.default_generator.manual_seed),
        (torch.cuda, "get_rng_state", get_state),
        (torch.cuda, "set_rng_state", set_state),
        (torch.Tensor, "cuda", lambda self, *a, **k: self),
        (torch.Tensor, "type", type_as_on_gpu),
    ]
    for owner, name, replacement in replacements:
        changes.replace(stack, owner, name, replacement)
    megatron_random.replace_recompute_generator(stack, get_state, set_state)
    megatron_random.silence_generator_warning(stack)
    logger.debug("no GPU: %d names of torch and Megatron-core now mean the CPU", len(CPU_PATCHES))


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
    arrays |= {f"torch/{name}": state.numpy() for name, state in rng_state().items()}
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
    set_rng_state(_below("torch/", tensors))
    tensor_parallel.get_cuda_rng_tracker().set_states(_below("tracker/", tensors))


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
