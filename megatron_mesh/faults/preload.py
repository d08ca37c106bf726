"""Import this in a fork server only: the process becomes one of a run, with everything imported.

The fault test's ranks are forks of it. This is the only module whose import has process-wide effects.
"""

from megatron_mesh import compat

compat.install()

import megatron_mesh.arguments  # noqa: E402
import megatron_mesh.train  # noqa: E402, F401
