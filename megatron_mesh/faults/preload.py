"""Import this only in a fork server: it makes the process a run's, with everything imported.

The fault test's ranks are forks of that server. No other module has process-wide effects on import.
"""

from megatron_mesh import compat

compat.install()

import megatron_mesh.arguments  # noqa: E402
import megatron_mesh.train  # noqa: E402, F401
