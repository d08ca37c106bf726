"""Checks that transformers is installed and new enough, before anything imports it."""

import importlib.metadata

from packaging.version import Version

from megatron_mesh.errors import UserError
from megatron_mesh.hf.modeling.versions import OLDEST

_REMEDY = "pip install 'megatron_mesh[hf]' (in a checkout: pip install -e '.[hf]')"


def check_transformers() -> None:
    """Raise UserError if transformers is missing or too old."""
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"transformers is not installed: {_REMEDY}") from None
    if Version(found).release < Version(OLDEST).release:
        raise UserError(f"transformers {found} is too old; {OLDEST} or newer is needed: {_REMEDY}")
