"""Pipeline stages and gradient reduction: the only folder that knows of stages.

In: a resolved ``Config`` and Megatron's process groups. Out: a ``Stage``, this rank's share of the model as
the schedule runs it. Start with ``stage.py``, then ``ring.py`` (passes round the ranks) and
``gradients.py``.
"""

from megatron_mesh.parallel.stage import Stage, build_stage, plain_stage

__all__ = ["Stage", "build_stage", "plain_stage"]
