"""Pipeline stages and gradient synchronisation: the only folder that knows of stages."""

from megatron_mesh.parallel.stage import Stage, build_stage, plain_stage

__all__ = ["Stage", "build_stage", "plain_stage"]
