"""Importing the package changes nothing outside of it, and what ``install`` changes can be taken back."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SNAPSHOT = """
    import importlib, os, pkgutil, signal, sys, warnings, logging
    import torch
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core import jit

    def snapshot():
        tensor = {name: vars(torch.Tensor).get(name) for name in ("cuda", "type")}
        functions = {name: getattr(torch, name) for name in ("compile", "tensor", "zeros", "ones", "empty")}
        gpu = dict(vars(torch.cuda))
        generators = {name: vars(megatron_random)[name] for name in vars(megatron_random) if "rng" in name}
        return {
            "meta_path": list(sys.meta_path), "path": list(sys.path), "path_hooks": list(sys.path_hooks),
            "filters": list(warnings.filters), "environment": dict(os.environ),
            "signals": {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)},
            "hook": sys.excepthook, "tensor": tensor, "torch": functions, "torch.cuda": gpu,
            "megatron": generators, "jit": jit.jit_fuser, "threads": torch.get_num_threads(),
            "dtype": torch.get_default_dtype(), "deterministic": torch.are_deterministic_algorithms_enabled(),
            "level": logging.getLogger(megatron_random.__name__).level, "root": list(logging.root.handlers),
            "allowed": set(torch.serialization.get_safe_globals()),
        }

    def changed(before, after):
        return [name for name in before if before[name] != after[name]]
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments, "-c", textwrap.dedent(code)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_importing_any_module_changes_nothing() -> None:
    """Other packages are imported first, since importing them may change such things."""
    code = (
        SNAPSHOT
        + """
    ours = "megatron_mesh"
    import megatron_mesh
    names = [m.name for m in pkgutil.walk_packages(megatron_mesh.__path__, "megatron_mesh.")]
    names = [name for name in names if not name.endswith((".__main__", "faults.preload"))]
    def import_all():
        for name in names:
            try:
                importlib.import_module(name)
            except (ImportError, TypeError) as error:  # vLLM or Transformer Engine is not installed
                assert name.endswith(("vllm_lm", "layers_te")), (name, error)
    import_all()
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron_mesh"]:
        del sys.modules[name]
    warnings.filterwarnings("error", message="one that is not ours")
    before = snapshot()
    import_all()
    print(changed(before, snapshot()), len([name for name in names if name in sys.modules]) > 80)
    """
    )
    done = python(code)
    assert done.stdout == "[] True\n", done.stdout + done.stderr


def test_importing_the_package_alone_changes_nothing() -> None:
    """With nothing imported before: no hook, no filter, no variable, and no heavy module."""
    code = """
    import os, sys, warnings
    import packaging.specifiers, importlib.metadata
    before = (list(sys.meta_path), list(warnings.filters), dict(os.environ))
    import megatron_mesh, megatron_mesh.compat, megatron_mesh.compat.table
    after = (list(sys.meta_path), list(warnings.filters), dict(os.environ))
    print(before == after, [name for name in ("torch", "megatron.core", "asyncio") if name in sys.modules])
    """
    done = python(code)
    assert done.stdout == "True []\n", done.stdout + done.stderr


def test_everything_is_taken_back() -> None:
    code = (
        SNAPSHOT
        + """
    from megatron_mesh import compat
    from megatron_mesh.runtime import device

    torch.cuda.is_available = lambda: False
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    before = snapshot()
    for _ in range(2):
        with compat.installed():
            compat.install()  # again: no effect
            installed = snapshot()
            device.prepare()
            patched = snapshot()
            assert torch.zeros(2, device="cuda").device.type == "cpu"
        print(changed(before, installed), changed(installed, patched), changed(before, snapshot()))
    compat.uninstall()  # again: no effect
    """
    )
    done = python(code)
    line = "['meta_path', 'filters'] ['tensor', 'torch', 'torch.cuda', 'megatron', 'level'] []\n"
    assert done.stdout == line * 2, done.stdout + done.stderr


def test_the_replaced_decorator_is_taken_back() -> None:
    code = """
    import torch
    from megatron_mesh import compat
    with compat.installed():
        from megatron.core import jit
        replaced = jit.jit_fuser
    print(replaced is not jit.jit_fuser is torch.compile)
    """
    done = python(code)
    assert done.stdout == "True\n", done.stderr


def test_megatron_core_is_imported_without_warnings() -> None:
    """After ``install``; without it there are some, so the texts that are silenced still exist."""
    code = """
    import sys, warnings
    if {install}:
        from megatron_mesh import compat
        compat.install()
    import megatron_mesh.train
    """
    quiet, loud = (python(code.format(install=install)) for install in (True, False))
    assert quiet.returncode == loud.returncode == 0
    assert "are not installed" not in quiet.stderr and "Apex" not in quiet.stderr
    assert "are not installed" in loud.stderr


def test_the_entry_point_installs_before_megatron_core_is_imported() -> None:
    """The modules that it imports at its top are light."""
    code = """
    import sys
    import pretrain_mesh
    print("megatron.core" in sys.modules)
    """
    done = python(code)
    assert done.stdout == "False\n", done.stderr
    text = (ROOT / "pretrain_mesh.py").read_text(encoding="utf-8")
    assert text.index("compat.install()") < text.index("sys.exit(main(")
