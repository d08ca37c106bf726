"""The ``megatron-mesh`` command: ``megatron-mesh NAME ...`` runs one of the project's programs.

A clone has the programs in ``tools/``, and a wheel has them in the package. Both run the same files.
"""

import ast
import runpy
import sys
from difflib import get_close_matches
from pathlib import Path

from megatron_mesh.runtime import exits
from megatron_mesh.runtime.entry import closed_pipe_is_no_error

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE.parent
_TOOLS = _PACKAGE / "tools" if (_PACKAGE / "tools").is_dir() else _ROOT / "tools"

PROGRAMS = {
    "pretrain": _ROOT / "pretrain_mesh.py",
    "plan": _TOOLS / "inspect_config.py",
    "compare-pipelines": _TOOLS / "compare_pipelines.py",
    "preprocess": _TOOLS / "preprocess_data.py",
    "preprocess-datatrove": _TOOLS / "preprocess_datatrove.py",
    "build-data-index": _TOOLS / "build_data_index.py",
    "submit": _TOOLS / "submit_slurm.py",
    "plot": _TOOLS / "plot_run.py",
    "checkpoint": _TOOLS / "checkpoint.py",
    "convert-to-hf": _TOOLS / "convert_to_hf.py",
    "convert-from-hf": _TOOLS / "convert_from_hf.py",
    "generate": _TOOLS / "generate.py",
    "evaluate": _TOOLS / "evaluate.py",
    "env-report": _TOOLS / "env_report.py",
    "check-communication": _TOOLS / "check_communication.py",
    "fault-test": _TOOLS / "fault_test.py",
}


def main() -> None:
    """Run the program that the first argument names, with the arguments after it."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        with closed_pipe_is_no_error():
            print(_help())
        return
    if name not in PROGRAMS:
        near = get_close_matches(name, PROGRAMS, n=1)
        hint = f"did you mean {near[0]}?" if near else "megatron-mesh --help lists the commands"
        print(f"error: unknown command {name}; {hint}", file=sys.stderr)
        sys.exit(exits.BAD_INPUT)
    sys.argv = [str(PROGRAMS[name]), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _help() -> str:
    """A line for each program, from its docstring: importing them all takes seconds."""
    lines = ["usage: megatron-mesh COMMAND ...", "", "megatron-mesh COMMAND --help shows its options.", ""]
    width = max(map(len, PROGRAMS))
    for name, path in PROGRAMS.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:<{width}}  {docstring.splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
