"""Updates the code in an export to this package's and leaves everything else unchanged."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import Version

import megatron_mesh
from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert import ship
from megatron_mesh.hf.convert.describe import TESTED_KEY
from megatron_mesh.hf.modeling.versions import TESTED
from megatron_mesh.recurrence import SCHEMES
from megatron_mesh.runtime import strict_json

REPLACED = "replaced_code"
"""Directory in an export for backups of replaced code that someone may have edited."""
_PARTIAL = ".refresh"  # suffix of a file that is being written


class _Shipped(NamedTuple):
    text: str
    header: ship.Header


def refresh_code(directory: Path) -> list[str]:
    """Replace the code of an export, and the two entries of config.json that describe it.

    These entries are ``auto_map`` and ``transformers_tested``. Each file is replaced atomically, config.json
    last, so after an interruption it is enough to refresh again. Code without a checksum, as in early
    exports, is first copied to ``replaced_code``, since we cannot tell whether it was edited.

    Returns:
        The names of the files that were written or removed. The list is empty if the code is up to date, or
        if the export has no code because it uses transformers' own model and tokenizer.

    Raises:
        UserError: the directory isn't an export, is newer than this package, contains edited code, or cannot
            be written. Then no file is changed.
    """
    config = _read_config(directory)
    looped, old = config["model_type"] != "gpt_neox", _shipped_files(directory)
    tokenizer = {name: text for name, text in ship.tokenizer_source().items() if name in old}
    new = {**ship.sources(), **tokenizer} if looped else tokenizer
    _check_code(directory, old, new)
    changed = {name: text for name, text in new.items() if name not in old or old[name].text != text}
    if looped and (updated := _updated(config)) != config:
        changed["config.json"] = _dumps_like(updated, directory / "config.json")
    obsolete = sorted(old.keys() - new.keys())
    replaced = [name for name in old if name in changed or name in obsolete]
    unchecked = {name: old[name].text for name in replaced if old[name].header.intact is None}
    _check_backups(directory / REPLACED, unchecked)
    try:
        if unchecked:
            (directory / REPLACED).mkdir(exist_ok=True)
        _write(directory / REPLACED, unchecked)
        _write(directory, changed)
        for name in obsolete:
            (directory / name).unlink()
    except OSError as error:
        raise UserError(f"cannot write to {directory} ({error}); fix this and refresh again") from None
    return sorted([*changed, *obsolete, *(f"{REPLACED}/{name}" for name in unchecked)])


def _read_config(directory: Path) -> dict[str, Any]:
    """Return the contents of config.json.

    Raises:
        UserError: it is missing or damaged, or it belongs to a model that isn't one of our exports.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); give the directory of an export") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("megatron_mesh", "gpt_neox"):
        raise UserError(
            f"{path} describes a {kind} model; give a directory written by tools/convert_to_hf.py"
        )
    if not isinstance(config.get("auto_map") or {}, dict):
        raise UserError(
            f"{path}: auto_map is not a JSON object; give a directory written by tools/convert_to_hf.py"
        )
    scheme = config.get("recurrence", "mesh")
    if kind == "megatron_mesh" and scheme not in list(SCHEMES):
        raise UserError(
            f"{path}: megatron_mesh {megatron_mesh.__version__} doesn't know the recurrence {scheme!r}; "
            "refresh with a version that does"
        )
    return config


def _shipped_files(directory: Path) -> dict[str, _Shipped]:
    """Return the files in a directory that have our header."""
    files = {}
    for path in sorted(path for path in directory.glob("*.py") if path.is_file()):
        text = path.read_text(encoding="utf-8", errors="replace")
        if (header := ship.read_header(text)) is not None:
            files[path.name] = _Shipped(text, header)
    return files


def _check_code(directory: Path, old: dict[str, _Shipped], new: dict[str, str]) -> None:
    """Raise UserError if refreshing would lose edits, or replace code by an older version."""
    for name, (_, header) in old.items():
        if header.intact is False:
            raise UserError(
                f"{directory / name} was edited after the export (its checksum differs), and refreshing "
                "would lose the edits; move it elsewhere and refresh again"
            )
        if Version(header.version) > Version(megatron_mesh.__version__):
            raise UserError(
                f"{directory / name} is from megatron_mesh {header.version}, which is newer than the "
                f"installed {megatron_mesh.__version__}; upgrade megatron_mesh"
            )
    for name in new:
        if name not in old and (directory / name).exists():
            raise UserError(
                f"{directory / name} would be overwritten, but lacks the first line of exported code, so it "
                "may not be ours; move it elsewhere and refresh again"
            )


def _check_backups(directory: Path, texts: dict[str, str]) -> None:
    """Raise UserError if a backup would overwrite a different file."""
    for name, text in texts.items():
        path = directory / name
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            raise UserError(
                f"{path} already exists with other content; move {directory} elsewhere and refresh again"
            )


def _updated(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the entries for the new code. Other ``auto_map`` entries stay."""
    auto_map = {**(config.get("auto_map") or {}), **ship.AUTO_MAP}
    return {**config, "auto_map": auto_map, TESTED_KEY: list(TESTED)}


def _dumps_like(config: dict[str, Any], path: Path) -> str:
    """Return ``config`` as JSON in the style of the existing file, so that no other line changes."""
    text = path.read_text(encoding="utf-8")
    return strict_json.dumps(config, indent=2, ensure_ascii=text.isascii()) + "\n" * text.endswith("\n")


def _write(directory: Path, texts: dict[str, str]) -> None:
    """Write all files under temporary names first, then rename them."""
    partials = {name: directory / f"{name}{_PARTIAL}" for name in texts}
    try:
        for name, partial in partials.items():
            partial.write_text(texts[name], encoding="utf-8")
            if (directory / name).exists():
                shutil.copymode(directory / name, partial)
        for name, partial in partials.items():
            os.replace(partial, directory / name)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
