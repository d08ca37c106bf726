"""Where results go, checked before anything is measured: a mistake must not cost the measurement."""

from pathlib import Path

from megatron_mesh.errors import UserError


def check_writable(output: Path) -> None:
    """Whether ``--output`` can be written, or replaced; leaves everything as it is."""
    existed = output.exists()
    try:
        output.open("a").close()
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written ({error.strerror}); name a file in a directory that exists"
        ) from None
    if not existed:
        output.unlink()


def check_tables(output: Path) -> None:
    """Whether the tables may stand beside ``--output``, with the ending .md."""
    tables = output.with_suffix(".md")
    if tables == output:
        raise UserError(
            f"--output {output} is where the tables go; name the JSON file, with the ending .json"
        )
    if tables.exists() and not output.exists():
        raise UserError(
            f"--output {output}: the tables would replace {tables}, which is of no earlier run; name "
            "another file"
        )


def make_directory(profile: Path) -> None:
    """Make the directory of ``--profile``."""
    try:
        profile.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--profile {profile} cannot be made ({error.strerror}); name a directory") from None
