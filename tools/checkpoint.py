#!/usr/bin/env python
"""List, verify, describe and reshard checkpoints, in one process and without a GPU.

    python tools/checkpoint.py list runs/160m-mesh
    python tools/checkpoint.py verify runs/160m-mesh/iter_0010000
    python tools/checkpoint.py show runs/160m-mesh/iter_0010000
    python tools/checkpoint.py reshard runs/160m-mesh/iter_0010000 --save weights --weights-only

Any rank layout loads any checkpoint, so you never need to reshard one to continue training. Reshard to turn
the many files of a large job into a few, or to keep the weights alone.
"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from megatron_mesh import command
from megatron_mesh.errors import UserError


@dataclass
class List:
    """List the checkpoints in a --save directory."""

    directory: Positional[Path]
    """The --save directory of a run."""


@dataclass
class Verify:
    """Compare every file with its checksum; exit status 1 if one is damaged."""

    checkpoint: Positional[Path]
    """An iter_... directory, or a run's directory for its newest checkpoint."""


@dataclass
class Show:
    """Print a checkpoint's step, sizes, versions and configuration."""

    checkpoint: Positional[Path]
    """An iter_... directory, or a run's directory for its newest checkpoint."""


@dataclass
class Reshard:
    """Write the checkpoint's state as a new checkpoint, from one process."""

    checkpoint: Positional[Path]
    """An iter_... directory, or a run's directory for its newest checkpoint."""
    save: Path
    """Directory for the new checkpoint."""
    weights_only: bool = False
    """Leave out the optimizer state."""


def main(options: List | Verify | Show | Reshard) -> int:
    """Run the subcommand. Return 1 if ``verify`` found damage."""
    from megatron_mesh.checkpoint import inspect

    try:
        match options:
            case List(directory):
                print(inspect.checkpoint_table(directory))
            case Show(checkpoint):
                print(inspect.description(checkpoint))
            case Verify(checkpoint):
                return inspect.verify(checkpoint)
            case Reshard(checkpoint, save, weights_only):
                inspect.reshard(checkpoint, save, weights_only=weights_only)
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}; check its permissions") from None
    return 0


if __name__ == "__main__":
    command.run(main, show_progress=True)
