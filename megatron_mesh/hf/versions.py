"""The versions of transformers that this code was tested with, and a warning about any newer one.

An export carries this file. It imports transformers only to warn, so tools may ask for the list without it.
"""

import importlib.metadata

from packaging.version import Version

TESTED = ("4.57.6", "5.16.1", "5.19.0", "5.23.0", "5.24.0")
"""Oldest first. Each is tested with ``make test-hf VERSION=...``. setup.py takes its bounds from here."""


def minor(version: str) -> str:
    """The minor release that a version belongs to: "5.24" for "5.24.1" and for "5.24.0.dev0"."""
    release = Version(version)
    return f"{release.major}.{release.minor}"


OLDEST = minor(TESTED[0])
"""With anything before this release our code fails."""


def warn_if_untested(installed: str | None = None) -> None:
    """Warn, once per process, if the installed transformers lies outside the tested versions.

    A patch release after the newest tested version only mends that version, so it counts as tested. A version
    between two tested ones isn't worth a warning: both neighbours work.

    Args:
        installed: version of transformers (default: the installed one's).
    """
    found = Version(installed or importlib.metadata.version("transformers"))
    oldest, newest = Version(TESTED[0]), Version(TESTED[-1])
    if found.release[:2] > newest.release[:2]:
        relation, nearest = "newer", newest
    elif found < oldest:
        relation, nearest = "older", oldest
    else:
        return
    from transformers.utils import logging

    # transformers imports an export's code under a new name for every directory. Its warning_once compares
    # logger and text, so all those copies warn once.
    logging.get_logger("transformers.megatron_mesh").warning_once(
        f"transformers {found} is {relation} than the versions that this model's code was tested with "
        f"({', '.join(TESTED)}). If the model fails or its output looks wrong, upgrade megatron_mesh and "
        "bring the code up to date with its tools/convert_to_hf.py --refresh-code DIR, or install a tested "
        f"version: pip install transformers=={nearest}"
    )
