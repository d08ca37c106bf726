"""Triton kernels for the memory's one expensive operation, a weighted sum of states.

The model passes ``weighted_sum`` to the recurrence, which stays pure torch. Triton is imported at the first
call. Start reading at ``mixing.py``.
"""

from .availability import available, why_unavailable
from .mixing import weighted_sum

__all__ = ["available", "weighted_sum", "why_unavailable"]
