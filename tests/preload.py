"""What fork servers of the tests import once, so that the processes of a case start at once."""

from megatron_mesh import compat

compat.install()

import megatron_mesh.train  # noqa: E402, F401
