"""Run a tool: parse its command line, then report errors in one line with the right exit status.

A tool is a dataclass of options, a function that takes it, and a last line::

    @dataclass
    class Options:
        load: Path
        \"\"\"Directory of the checkpoint.\"\"\"

    def main(options: Options) -> None: ...

    if __name__ == "__main__":
        command.run(main)

The tool's docstring is the text of its ``--help``. If ``main`` has a second parameter, it receives the
arguments that are not options of the tool, such as settings of ``pretrain_mesh.py``.
"""

import ast
import inspect
import io
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_type_hints

from megatron_mesh.errors import OutOfMemory, RanksLost, UserError
from megatron_mesh.runtime import exits
from megatron_mesh.runtime.entry import closed_pipe_is_no_error

if TYPE_CHECKING:
    from tyro.constructors import (
        ConstructorRegistry,
        PrimitiveConstructorSpec,
        PrimitiveTypeInfo,
        StructConstructorSpec,
        StructFieldSpec,
        StructTypeInfo,
    )

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in a shell."""

Main = Callable[..., int | None]
"""Takes a tool's options and returns its exit status (None for 0)."""


def run(
    main: Main,
    *,
    show_progress: bool = False,
    removes_files: bool = False,
    if_interrupted: str = "",
    prints_errors: Callable[[], bool] = lambda: True,
) -> None:
    """Call ``main`` with the options on this process's command line; exit unless its status is 0.

    Args:
        show_progress: show the package's log messages from INFO on, not only its warnings.
        removes_files: ``main`` removes temporary files at its end, so SIGTERM ends it as Ctrl-C does.
        if_interrupted: printed after Ctrl-C.
        prints_errors: whether this process prints its errors. One rank of a job is enough.
    """
    with closed_pipe_is_no_error():
        try:
            if show_progress:
                from megatron_mesh.metrics.console import show_messages

                show_messages(True)
            if removes_files:
                signal.signal(signal.SIGTERM, signal.default_int_handler)
                os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
            from megatron_mesh import compat

            compat.install()
            status = call(main, sys.argv[1:])
        except (UserError, OutOfMemory, RanksLost) as error:
            if prints_errors():
                print(f"error: {error}", file=sys.stderr)
            sys.exit(exits.BAD_INPUT if isinstance(error, UserError) else exits.CRASHED)
        except KeyboardInterrupt:
            if if_interrupted:
                print(f"\n{if_interrupted}", file=sys.stderr)
            sys.exit(INTERRUPTED)
        if status:
            sys.exit(status)


def call(main: Main, argv: Sequence[str]) -> int | None:
    """Call ``main`` with the options in ``argv``; errors are raised.

    Raises:
        UserError: an option is unknown or missing, or has a wrong value.
        SystemExit: ``--help`` was printed.
    """
    module = main.__globals__
    hints = get_type_hints(main, include_extras=True)
    hints.pop("return", None)
    kind, *others = hints.values()
    prog, docstring = Path(module["__file__"]).name, module["__doc__"]
    # Ctrl-C during an import would print a traceback, and some libraries catch it and continue.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        found = parse(kind, argv, prog=prog, docstring=docstring, return_unknown_args=bool(others))
    finally:
        signal.signal(signal.SIGINT, handler)
    return main(*found) if others else main(found)


def parse(
    kind: Any, argv: Sequence[str], *, prog: str, docstring: str, negations: bool = False, **more: Any
) -> Any:
    """Parse a command line into an object of type ``kind``, a dataclass or a union of dataclasses.

    Args:
        docstring: the text of ``--help``.
        negations: accept ``--no-NAME`` for booleans.
        more: further arguments of ``tyro.cli``.

    Raises:
        UserError: an option is unknown or missing, or has a wrong value.
        SystemExit: ``--help`` was printed.
    """
    import tyro

    if {"-h", "--help"} & set(argv):
        print(_wrapped(docstring), end="\n\n")  # tyro would join or break some of the lines
    markers = (tyro.conf.OmitArgPrefixes, *(() if negations else (tyro.conf.FlagCreatePairsOff,)))
    cli: Any = tyro.cli
    message = io.StringIO()
    try:
        with redirect_stderr(message):
            return cli(
                kind, prog=prog, description="", args=argv, config=markers, registry=_registry(), **more
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_one_line(message.getvalue())) from None


@cache
def _registry() -> "ConstructorRegistry":
    """How tyro reads our types."""
    from tyro.constructors import ConstructorRegistry

    registry = ConstructorRegistry()
    registry.struct_rule(_dataclass)
    registry.primitive_rule(_optional)
    return registry


_DEFAULT_IN_TEXT = re.compile(r" \(default: [^)]*\)")


def _dataclass(info: "StructTypeInfo") -> "StructConstructorSpec | None":
    """Parse a dataclass of options, with the help texts and defaults that our docstrings mean.

    tyro would keep the source's line breaks in help texts. It would also show "(default: unset)" after a text
    that names a default, e.g. "(default: all)".
    """
    from tyro import MISSING_NONPROP
    from tyro.constructors import StructConstructorSpec

    # tyro wraps a union of subcommands in a dataclass of its own.
    if not isinstance(info.type, type) or not is_dataclass(info.type) or info.type.__module__[:5] == "tyro.":
        return None
    texts, types = _help_texts(info.type), get_type_hints(info.type, include_extras=True)
    found = []
    for each in fields(info.type):
        if isinstance(info.default, info.type):
            default = getattr(info.default, each.name)
        elif each.default_factory is not MISSING:
            default = each.default_factory()
        else:
            default = MISSING_NONPROP if each.default is MISSING else each.default
        found.append(_field(each.name, types[each.name], default, texts.get(each.name)))
    return StructConstructorSpec(instantiate=info.type, fields=tuple(found))


def _field(name: str, kind: Any, default: Any, text: str | None) -> "StructFieldSpec":
    from tyro.conf import arg
    from tyro.constructors import StructFieldSpec

    named = _DEFAULT_IN_TEXT.search(text or "")
    if named and not default:
        kind = Annotated[kind, arg(help_behavior_hint=named[0].strip())]
    return StructFieldSpec(name, kind, default, text and _DEFAULT_IN_TEXT.sub("", text))


@cache
def _help_texts(cls: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, each on one line."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _optional(info: "PrimitiveTypeInfo") -> "PrimitiveConstructorSpec | None":
    """Parse ``X | None`` as an X, and show it as one in ``--help`` (tyro shows ``{None}|X``)."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    if info.type_origin not in (Union, UnionType):
        return None
    types = [option for option in get_args(info.type) if option is not NoneType]
    if len(types) != 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(types[0], info.markers))
    assert isinstance(spec, PrimitiveConstructorSpec)
    return replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["unset"] if value is None else spec.str_from_instance(value),
    )


def _wrapped(docstring: str) -> str:
    """The text, wrapped for the terminal except for indented paragraphs."""
    width = min(shutil.get_terminal_size().columns, 110)
    paragraphs = docstring.strip().split("\n\n")
    return "\n\n".join(text if text[0] == " " else textwrap.fill(text, width) for text in paragraphs)


_REWORDED = {
    r"Unrecognized options: (-.*)": r"unknown option \1",
    r"Unrecognized options: (.*)": r"unknown argument \1",
    r"Expected one of \{(.*)\}\.": r"give one of these commands: \1",
    r"Missing value for argument '(\S+)'.*": r"\1 needs a value",
    r"Error parsing (\S+): invalid literal for int\(\) with base 10: '(.*)'": r"\1 \2 is not a whole number",
    r"Error parsing (\S+): could not convert string to float: '(.*)'": r"\1 \2 is not a number",
    r"Error parsing (\S+): no type matching (\S+) could be .* from \['(.*?)'\].*": r"\1 \3 is not \2",
    r"Error parsing (\S+): (.*)": r"\1: \2",
    r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*?),?\)\.": r"\2 \1 is not one of \3",
}
"""tyro's messages -> ours."""


def _one_line(box: str) -> str:
    """The message in a box that tyro prints. The rest of the box repeats ``--help``."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    title = 1 if plain.startswith("╭") else 2  # without UTF-8, the title has a line of its own
    lines = [line[1:-1].rstrip() for line in plain.splitlines()[title:]]
    end = next(index for index, line in enumerate(lines) if line and set(line) <= set(" ─-"))
    message, hints = lines[:end], lines[end:]
    if "Missing from" in message[0]:
        names = [line.split()[0] for line in message if re.match(r" {5}\S", line)]
        return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing; see --help"
    text = " ".join(map(str.strip, message))
    for pattern, ours in _REWORDED.items():
        text = re.sub(pattern, ours, text)
    near = [line.split()[0].rstrip(",") for line in hints if re.match(r" {5}--", line)]
    return f"{text}; did you mean {near[0]}?" if near and "unknown" in text else f"{text}; see --help"
