"""The supported versions of the packages whose internals we use, and a check that they are installed.

The check reads only the packages' metadata, so it fails before imports that take seconds.
"""

import importlib.metadata

from packaging.specifiers import SpecifierSet

from megatron_mesh.errors import UserError

# setup.py requires the same versions; a test compares them. Megatron-core is pinned, because we patch and
# subclass it. The bounds of Transformer Engine are those of megatron-core 0.16.1's own extra.
SUPPORTED = {
    "megatron-core": "==0.16.1",
    "torch": ">=2.9,<2.14",
    "transformer-engine": ">=2.9,<2.12",
}


def check_versions() -> None:
    """Check Megatron-core and torch, and Transformer Engine if it is installed.

    A Transformer Engine that is newer than tested is accepted; ``tools/env_report.py`` mentions it.

    Raises:
        UserError: a package is missing, or its version is not supported.
    """
    for package in ("megatron-core", "torch"):
        require(package, SUPPORTED[package], f"pip install '{package}{SUPPORTED[package]}'")
    package = "transformer-engine"
    oldest, _ = SUPPORTED[package].split(",")
    if version(package) is not None:
        remedy = f"pip install --no-build-isolation 'transformer-engine[pytorch]{SUPPORTED[package]}'"
        require(package, oldest, f"{remedy}, or to train without it: pip uninstall transformer-engine")


def require(package: str, wanted: str, remedy: str) -> None:
    """Raise UserError unless the installed version of ``package`` fits ``wanted``.

    Args:
        wanted: the supported versions, such as ">=2.9,<2.14".
        remedy: the command that installs one of them.
    """
    found = version(package)
    if found is None:
        raise UserError(f"{package} is not installed ({wanted} is needed); run: {remedy}")
    if not fits(found, wanted):
        raise UserError(f"{package} {found} is installed, but {wanted} is needed; run: {remedy}")


def fits(found: str, wanted: str) -> bool:
    """Return whether a version fits. Pre-releases may fit too, such as NVIDIA's torch 2.10.0a0."""
    return SpecifierSet(wanted).contains(found, prereleases=True)


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
