"""Whether Triton's kernels can run in this process."""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from megatron_mesh.runtime import device


def available() -> bool:
    """Whether ``weighted_sum`` runs here: a GPU, triton, and what triton needs to start a kernel."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """What is missing, in words; None where nothing is.

    Triton builds a small C library before its first launch (``triton/runtime/build.py``). A machine that
    cannot must be told apart here: training would end at its first step.
    """
    if not device.has_gpu():
        return "there is no GPU"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler: install gcc, or name one in CC"
    # As triton asks: Debian's own Python has a default scheme for what users install, which has no headers.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not (Path(sysconfig.get_paths(scheme)["include"]) / "Python.h").exists():
        return "triton needs Python's C headers: install python3-dev"
    return None
