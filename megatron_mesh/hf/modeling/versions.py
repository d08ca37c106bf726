"""Lists the versions of transformers that this code was tested with, and warns about other ones.

An export carries this file. It imports transformers only to warn, so that tools can read the list without it.
"""

import importlib.metadata

from packaging.version import Version

TESTED = ("4.57.6", "5.16.1", "5.19.0", "5.23.0", "5.24.0")
"""Oldest first. ``make test-hf VERSION=...`` tests each of them. setup.py reads its bounds from here."""


def minor(version: str) -> str:
    """Return the minor release of a version: "5.24" for "5.24.1" and for "5.24.0.dev0"."""
    release = Version(version)
    return f"{release.major}.{release.minor}"


OLDEST = minor(TESTED[0])
"""The oldest release that this code works with."""


def warn_if_untested(installed: str | None = None) -> None:
    """Warn once per process if transformers is older or newer than all tested versions.

    Patch releases of the newest tested version only fix bugs, so they count as tested. A version between two
    tested ones causes no warning, since both its neighbours work.

    Args:
        installed: the version to check (default: that of the installed transformers).
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

    # transformers imports this file once for every directory, each time under a new name. A logger with a
    # fixed name makes warning_once recognize the repeated text.
    logging.get_logger("transformers.megatron_mesh").warning_once(
        f"transformers {found} is {relation} than the versions that this model's code was tested with "
        f"({', '.join(TESTED)}). If the model fails or its output looks wrong, install a tested version "
        f"(pip install transformers=={nearest}), or upgrade megatron_mesh and update the model's code with "
        "tools/convert_to_hf.py --refresh-code DIR"
    )
