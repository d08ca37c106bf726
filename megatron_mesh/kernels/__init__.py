"""The memory's one heavy operation as Triton kernels; ``recurrence`` gets it handed in and stays pure torch.

Triton is imported by the first call of ``weighted_sum``, never before.
"""

from .availability import available, why_unavailable
from .mixing import weighted_sum

__all__ = ["available", "weighted_sum", "why_unavailable"]
