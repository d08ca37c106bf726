"""Report the hardware, the installed packages, and what each missing optional package costs."""

import importlib.metadata
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_mesh.compat.versions import SUPPORTED, fits

try:
    from megatron_mesh.runtime import device
except (ImportError, OSError) as error:  # torch or a library that it needs is missing
    NO_TORCH = f"torch cannot be imported ({error})"
else:
    NO_TORCH = ""

# Package -> what is different without it.
OPTIONAL = {
    "transformer-engine": "no FP8; torch's attention, norms and AdamW",
    "apex": "not needed with Transformer Engine; without both: no fused weight gradients, and torch's AdamW",
    "flash-attn": "flash attention comes from cuDNN (Transformer Engine) or torch",
    "triton": "torch's operations read the memory, in several passes",
    "gigatoken": "preprocessing uses Hugging Face's tokenizers and is ten times slower",
    "datatrove": "no preprocessing on a cluster",
    "transformers": "no conversion to Hugging Face, no generation",
    "lm-eval": "no tools/evaluate.py",
    "wandb": "no logging to Weights & Biases",
}
REQUIRED = (
    *("megatron-core", "torch", "numpy", "packaging", "psutil", "sentencepiece", "tokenizers", "PyYAML"),
    *("zstandard", "tyro", "rich", "tensorboard", "matplotlib"),
)
# NVIDIA's and nightly builds have other names.
_ALSO_CALLED = {"triton": "pytorch-triton"}
_VARIABLES = ("NCCL_", "SLURM_JOB_ID", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", "MASTER_ADDR")
_SLURM = ("sbatch", "srun", "scontrol")
_DRIVER = Path("/proc/driver/nvidia/version")
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    what: str
    found: str
    note: str = ""


def report() -> list[Row]:
    """The machine, the required packages, the optional ones and the surroundings."""
    return [*_machine(), *_required(), *_optional(), *_layers(), *_surroundings()]


def missing_required() -> list[str]:
    """Required packages that are not installed."""
    return [name for name in REQUIRED if not _version(name)]


def _machine() -> list[Row]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    rows = [
        Row("host", platform.node(), platform.platform()),
        Row("python", platform.python_version()),
        Row("CPU", f"{len(os.sched_getaffinity(0))} cores", f"{memory:.0f} GiB of memory"),
    ]
    if _DRIVER.exists():
        found = re.search(r"\d{3,}\.[\d.]+", _DRIVER.read_text())
        rows.append(Row("NVIDIA driver", found[0] if found else "unknown"))
    if NO_TORCH:
        return [*rows, Row("GPU", "unknown", NO_TORCH)]
    gpus = device.gpus()
    if not gpus:
        rows.append(Row("GPU", "none", device.why_no_gpu()))
    return rows + [Row(f"GPU {index}", name, note) for index, (name, note) in enumerate(gpus)]


def _required() -> list[Row]:
    rows = [Row(name, _version(name) or "MISSING", "" if _version(name) else "needed") for name in REQUIRED]
    libraries = {} if NO_TORCH else device.libraries()
    return [*rows, *(Row(name, version) for name, version in libraries.items())]


def _optional() -> list[Row]:
    return [
        Row(name, version, "") if (version := _version(name)) else Row(name, "missing", cost)
        for name, cost in OPTIONAL.items()
    ]


def _layers() -> list[Row]:
    """Which layers a run would use, and whether they can compute in FP8."""
    reason = _why_not_transformer_engine()
    if reason:
        return [Row("layers", "torch's", reason), Row("FP8", "no", "needs Transformer Engine's layers")]
    tested = SUPPORTED["transformer-engine"]
    fitting = fits(_version("transformer-engine") or "0", tested)
    note = "" if fitting else f"megatron-core is tested with {tested}"
    fp8 = device.why_no_fp8()
    return [Row("layers", "Transformer Engine's", note), Row("FP8", "no" if fp8 else "yes", fp8 or "")]


def _why_not_transformer_engine() -> str | None:
    if not _version("transformer-engine"):
        return "Transformer Engine is not installed"
    if NO_TORCH or missing_required():
        return NO_TORCH or "required packages are missing"
    # Megatron-core takes seconds to import.
    from megatron_mesh.model.implementation import why_no_transformer_engine

    return why_no_transformer_engine() or (None if device.has_gpu() else "there is no GPU")


def _surroundings() -> list[Row]:
    ports = sorted(path.name for path in _INFINIBAND.iterdir()) if _INFINIBAND.is_dir() else []
    slurm = [name for name in _SLURM if shutil.which(name)]
    rows = [
        Row("InfiniBand", ", ".join(ports) or "none", "" if ports else "nodes communicate over TCP"),
        Row("SLURM", ", ".join(slurm) or "none", "" if slurm else "tools/submit_slurm.py does not work here"),
    ]
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
    return rows + [Row(f"${name}", value) for name, value in found.items()]


def _version(name: str) -> str | None:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return _version(_ALSO_CALLED[name]) if name in _ALSO_CALLED else None
    if name == "apex" and not any("fused" in str(path) or "amp_C" in str(path) for path in found.files or []):
        return None  # the unrelated package of that name on PyPI
    return found.version
