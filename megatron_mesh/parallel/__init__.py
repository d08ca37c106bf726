"""Pipeline stages and gradient reduction: takes a configuration, returns this rank's ``Stage`` of the model.

No other folder knows how the model is split over pipeline ranks. Start reading at ``ring.py``.
"""

from megatron_mesh.parallel.stage import Stage, build_stage, plain_stage

__all__ = ["Stage", "build_stage", "plain_stage"]
