"""The command line of training: flags override the YAML file, which overrides the defaults."""

import argparse
import ast
import dataclasses
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import NEGATED, SETTINGS, flag, flatten, unknown_setting, with_values
from megatron_mesh.config.sources import ALTERNATIVE_NAMES, PATHS, merge, read_yaml
from megatron_mesh.config.yaml_file import expand_user
from megatron_mesh.recurrence import SCHEMES

_DESCRIPTION = f"""\
Pretrain a recursive transformer.

python pretrain_mesh.py --config examples/configs/pythia-160m.yaml --data-path my_corpus_text_document

A flag overrides the YAML file, which overrides the defaults. Recurrence schemes: {", ".join(SCHEMES)}."""


@dataclass
class Arguments:
    """A parsed command line."""

    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """YAML file of settings, named like the flags but with underscores, e.g. hidden_size: 768."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a plan of the run (parameters, FLOPs, steps and memory) and exit."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """All settings."""


def parse_args(argv: Sequence[str], prog: str = "pretrain_mesh.py") -> Arguments:
    """Parse a command line, without the program's name, and the YAML file that it names.

    This checks each setting by itself. ``config.checks.resolve`` checks how they fit together.

    Raises:
        UserError: a setting is unknown or not supported, or the YAML file is invalid.
        SystemExit: after ``--help`` (0), or after a message on stderr about a value of the wrong type (2).
    """
    _refuse_unknown(argv)
    path = _config_file(argv, prog)
    file = read_yaml(path) if path else {}
    # Settings that exclude each other stay None here, so that any other value afterwards comes from a flag.
    plain = {name: value for name, value in file.items() if name not in ALTERNATIVE_NAMES}
    arguments = tyro.cli(
        Arguments,
        prog=prog,
        description=_DESCRIPTION,
        args=argv,
        default=Arguments(config=with_values(Config(), plain)),
        config=(tyro.conf.OmitArgPrefixes,),
        registry=_REGISTRY,
    )
    flags = {name: value for name, value in flatten(arguments.config).items() if value is not None}
    chosen = merge(
        {name: file[name] for name in ALTERNATIVE_NAMES & file.keys()},
        {name: flags[name] for name in ALTERNATIVE_NAMES & flags.keys()},
    )
    config = with_values(arguments.config, {**dict.fromkeys(ALTERNATIVE_NAMES), **chosen})
    return replace(arguments, config=with_values(config, _expanded_paths(config)))


def _expanded_paths(config: Config) -> dict[str, Any]:
    """Return the paths with ``~`` expanded, since shells don't expand it in ``--save=~/x``."""
    paths = {name: value for name, value in flatten(config).items() if name in PATHS and value is not None}
    return {
        name: [expand_user(word) for word in value] if isinstance(value, list) else expand_user(value)
        for name, value in paths.items()
    }


def _config_file(argv: Sequence[str], prog: str) -> Path | None:
    parser = argparse.ArgumentParser(
        prog=prog, usage="%(prog)s --config FILE", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path)
    return parser.parse_known_args(argv)[0].config


def _refuse_unknown(argv: Sequence[str]) -> None:
    known = {*SETTINGS, *NEGATED, "config", "dry_run", "help"}
    for argument in argv:
        name = argument.removeprefix("--").split("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in known:
            raise unknown_setting(name, known, flag)


_REGISTRY = ConstructorRegistry()
_DEFAULT_IN_TEXT = re.compile(r" \(default: [^)]*\)")


@_REGISTRY.struct_rule
def _settings_group(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Parse a dataclass of settings, and correct how ``--help`` shows their docstrings and defaults.

    tyro keeps the line breaks of the source. It also shows "(default: unset)" after a text that names the
    default, e.g. "(default: all)".
    """
    if not dataclasses.is_dataclass(info.type):
        return None
    texts = _help_texts(info.type)
    return StructConstructorSpec(
        instantiate=info.type,
        fields=tuple(
            _field(name, type_, getattr(info.default, name), texts.get(name))
            for name, type_ in get_type_hints(info.type, include_extras=True).items()
        ),
    )


def _field(name: str, type_: Any, default: Any, text: str | None) -> StructFieldSpec:
    named = _DEFAULT_IN_TEXT.search(text or "")
    if named and default is None:
        type_ = Annotated[type_, tyro.conf.arg(help_behavior_hint=named[0].strip())]
    return StructFieldSpec(name, type_, default, text and _DEFAULT_IN_TEXT.sub("", text))


@cache
def _help_texts(cls: type) -> dict[str, str]:
    """Return the docstrings below the fields of a dataclass, each on one line."""
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


@_REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Parse ``X | None`` as an X, and show it as one in ``--help`` (tyro shows ``{None}|X``)."""
    if info.type_origin not in (Union, UnionType):
        return None
    (inner,) = (option for option in get_args(info.type) if option is not NoneType)
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(inner, info.markers))
    assert isinstance(spec, PrimitiveConstructorSpec)
    return replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["unset"] if value is None else spec.str_from_instance(value),
    )
