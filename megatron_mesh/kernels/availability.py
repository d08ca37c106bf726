"""Find out whether the Triton kernels can run in this process."""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from megatron_mesh.runtime import device


def available() -> bool:
    """Whether ``weighted_sum`` runs here. It needs a GPU, triton, a C compiler and Python's headers."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """Return what is missing, or None if the kernels can run.

    Triton compiles a small C library before its first launch (``triton/runtime/build.py``). We check now
    whether it can, because otherwise training would crash in its first step.
    """
    if not device.has_gpu():
        return "there is no GPU"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler: install gcc or set CC"
    # Like triton, ask for the headers of posix_prefix: Debian's default scheme, posix_local, has none.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not (Path(sysconfig.get_paths(scheme)["include"]) / "Python.h").exists():
        return "triton needs Python's C headers: install python3-dev"
    return None
