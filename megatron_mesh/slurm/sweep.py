"""Sweeps: one run for each combination of values of some settings, submitted as one job array."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import SETTINGS, flag, unknown_setting
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.run_files import ARRAY_SCRIPT, BATCH_SCRIPT, CODE_FOLDER, SLURM_FOLDER
from megatron_mesh.slurm.script import JobRequest, array_script, batch_script, slurm_directory
from megatron_mesh.slurm.site import Site
from megatron_mesh.slurm.submission import (
    config_for_jobs,
    copy_code,
    new_directories,
    submit_and_record,
    write_job_files,
)

_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Element:
    """One run of a sweep."""

    run: Path
    config: Config


def expand_sweep(
    sweeps: Sequence[str], settings: Sequence[str], top: Path, site: Site, nodes: int, prog: str
) -> list[Element]:
    """The runs of a sweep, each in ``top/NAME=VALUE``, or ``top/NAME=VALUE_NAME=VALUE`` for two settings.

    Args:
        sweeps: texts like ``seed=1,2,3``; several make the product.
        settings: the settings' flags that all runs share.

    Raises:
        UserError: a sweep does not have this form, or the settings of a run are refused.
    """
    axes = [_axis(text) for text in sweeps]
    names = [name for name, _ in axes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--sweep {name} is given twice; list all values at once: --sweep {name}=1,2,3")
    found = []
    for values in product(*(values for _, values in axes)):
        choice = dict(zip(names, values, strict=True))
        label = "_".join(f"{name}={value}" for name, value in choice.items())
        flags = [word for name, value in choice.items() for word in _flags(name, value)]
        config = _separate_outputs(parse_args([*settings, *flags], prog=prog).config, label, names)
        run = top / label
        try:
            found.append(Element(run, config_for_jobs(config, run, site, nodes)))
        except UserError as error:
            raise UserError(f"{label}: {error}") from None
    return found


def _separate_outputs(config: Config, label: str, names: Sequence[str]) -> Config:
    """Add the run's label to directories and names that runs would share, unless these are swept."""
    logging = config.logging
    outputs: dict[str, Any] = {
        "output_dir": logging.output_dir and str(Path(logging.output_dir, label)),
        "tensorboard_dir": logging.tensorboard_dir and str(Path(logging.tensorboard_dir, label)),
        "wandb_exp_name": logging.wandb_exp_name and f"{logging.wandb_exp_name}-{label}",
    }
    outputs = {name: value for name, value in outputs.items() if name not in names}
    return replace(config, logging=replace(logging, **outputs))


def _axis(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    options = values.split(",")
    if not equals or not all(options):
        raise UserError(f"--sweep {text} is not NAME=VALUE,VALUE; write for example --sweep seed=1,2,3")
    if name not in SETTINGS:
        raise unknown_setting(name, SETTINGS, flag)
    if name == "save":
        raise UserError("--sweep save is not possible; each run gets its own directory under --save")
    for value in options:
        if "/" in value or value.startswith(".") or options.count(value) > 1:
            raise UserError(
                f"--sweep {text}: {value!r} cannot name a run's directory; it has a slash, starts with a dot "
                "or is given twice"
            )
    return name, options


def _flags(name: str, value: str) -> list[str]:
    if SETTINGS[name].type is not bool:
        return [flag(name), value]
    if value not in _BOOLEANS:
        raise UserError(f"--sweep {name}={value}: not a boolean; write true or false")
    return [flag(name if _BOOLEANS[value] else f"no_{name}")]


def write_and_submit_sweep(
    found: Sequence[Element], top: Path, site: Site, request: JobRequest, at_once: int | None
) -> list[str]:
    """Write every run's files, submit an array (or a chain of arrays) and return the arrays' numbers.

    The runs share one copy of the code in ``top/slurm/code``, which is ``request.code``. ``top/slurm/N``
    links to the ``RUN/slurm`` of element N. On an error nothing is left behind.

    Raises:
        UserError: SLURM refuses the array, or the directory cannot be written.
    """
    target = slurm_directory(top)
    scripts = [batch_script(each.run, each.config.checkpoint.load, site, request) for each in found]
    with new_directories(target, *(slurm_directory(each.run) for each in found)):
        copy_code(target / CODE_FOLDER)
        for index, (each, script) in enumerate(zip(found, scripts, strict=True)):
            write_job_files(each.config, each.run, site, script, with_code=False)
            (target / str(index)).symlink_to(Path("..", each.run.name, SLURM_FOLDER))
        script = array_script(top, len(found), site, request, at_once)
        (target / ARRAY_SCRIPT).write_text(script, encoding="utf-8")
        return submit_and_record(
            target / ARRAY_SCRIPT,
            request.chain,
            lambda arrays: {
                each.run: [f"{array}_{index}" for array in arrays] for index, each in enumerate(found)
            },
        )


def runs_in(path: Path) -> list[Path]:
    """The runs in a sweep's directory, in the order of the array; for any other path the path itself."""
    if not (slurm_directory(path) / ARRAY_SCRIPT).is_file():
        return [path]
    links = [
        link
        for link in slurm_directory(path).iterdir()
        if link.name.isdecimal() and (link / BATCH_SCRIPT).is_file()
    ]
    return [path / link.readlink().parent.name for link in sorted(links, key=lambda link: int(link.name))]
