"""The versions of the packages whose internals this code uses, and the check that they are installed.

The check reads the packages' metadata and imports none of them, so it comes before imports that take seconds.
"""

import importlib.metadata

from packaging.specifiers import SpecifierSet

from megatron_mesh.errors import UserError

# setup.py asks for the same; a test compares them. Megatron-core is patched and subclassed, so it must be
# this version exactly. The bounds of Transformer Engine are those of megatron-core 0.16.1's own extra.
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
    """Raise UserError unless a version of ``package`` is installed that fits ``wanted``.

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
    """Whether a version fits. Pre-releases, such as NVIDIA's torch 2.10.0a0, count."""
    return SpecifierSet(wanted).contains(found, prereleases=True)


def version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
