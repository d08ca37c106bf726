"""The library that everything here needs, asked for before it is imported."""

import importlib.metadata

from megatron_mesh.errors import UserError

_OLDEST = (4, 57)
_REMEDY = "pip install 'megatron_mesh[hf]' (in a checkout: pip install -e '.[hf]')"


def check_transformers() -> None:
    """Raise UserError if transformers is not there, or too old for our models."""
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"transformers is not installed: {_REMEDY}") from None
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        raise UserError(f"transformers {found} is too old, 4.57 or newer is needed: {_REMEDY}")
