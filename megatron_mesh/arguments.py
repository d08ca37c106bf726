"""The command line of training: flags override the YAML file, which overrides the defaults."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from megatron_mesh.command import parse
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import (
    ALTERNATIVE_NAMES,
    NEGATED,
    PATHS,
    SETTINGS,
    expand_user,
    flag,
    flatten,
    merge,
    read_yaml,
    unknown_setting,
    with_values,
)
from megatron_mesh.recurrence import SCHEMES

_DESCRIPTION = f"""\
Pretrain a recursive transformer.

  python pretrain_mesh.py --config examples/configs/pythia-160m.yaml --data-path my_corpus_text_document

A flag overrides the YAML file, which overrides the defaults. Recurrence schemes: {", ".join(SCHEMES)}."""


@dataclass
class Arguments:
    """A parsed command line."""

    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """YAML file of settings, named like the flags but with underscores (hidden_size: 768), or the name of a
    preset, such as pythia-1.4b."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a plan of the run (parameters, FLOPs, steps and memory) and exit."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """All settings."""


def parse_args(argv: Sequence[str], prog: str = "pretrain_mesh.py") -> Arguments:
    """Parse a command line, without the program's name, and the YAML file that it names.

    This checks each setting by itself. ``config.checks.resolve`` checks how they fit together.

    Raises:
        UserError: a setting is unknown or not supported, a value has the wrong type, or the YAML file is
            invalid.
        SystemExit: ``--help`` was printed.
    """
    _refuse_unknown(argv)
    path = _config_file(argv, prog)
    file = read_yaml(path) if path else {}
    # Settings that exclude each other stay None here, so that any other value afterwards comes from a flag.
    plain = {name: value for name, value in file.items() if name not in ALTERNATIVE_NAMES}
    arguments: Arguments = parse(
        Arguments,
        argv,
        prog=prog,
        docstring=_DESCRIPTION,
        negations=True,
        default=Arguments(config=with_values(Config(), plain)),
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
    parser.add_argument("--config", type=Path, nargs="?")  # tyro refuses it without a value
    return parser.parse_known_args(argv)[0].config


def _refuse_unknown(argv: Sequence[str]) -> None:
    known = {*SETTINGS, *NEGATED, "config", "dry_run", "help"}
    for argument in argv:
        name = argument.removeprefix("--").split("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in known:
            raise unknown_setting(name, known, flag)
