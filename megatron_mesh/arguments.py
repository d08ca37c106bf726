"""The command line: defaults < YAML file < flags. Flags carry Megatron-LM's names."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

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
    """What a command line says."""

    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """YAML file of settings: the flags' names with underscores, e.g. hidden_size: 768."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the plan (parameters, FLOPs, steps, memory) and exit."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """All settings."""


def parse_args(argv: Sequence[str], prog: str = "pretrain_mesh.py") -> Arguments:
    """Read a command line (without the program's name) and the YAML file that it names.

    Nothing is checked across settings: that is ``config.checks.resolve``.

    Raises:
        UserError: an unknown or refused setting, or a YAML file that is not as it should be.
        SystemExit: ``--help`` (0), or a flag's value of the wrong type (2, said on stderr).
    """
    _refuse_unknown(argv)
    path = _config_file(argv, prog)
    file = read_yaml(path) if path else {}
    # Fields that exclude each other stay at None here: whatever they hold afterwards is from a flag.
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
    return replace(arguments, config=with_values(config, _homes(config)))


def _homes(config: Config) -> dict[str, Any]:
    """The paths, with ``~`` replaced: shells leave it in ``--save=~/x``."""
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


@_REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """``X | None`` takes an X, and ``--help`` shows it as an X that is unset (tyro: ``{None}|X``)."""
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
