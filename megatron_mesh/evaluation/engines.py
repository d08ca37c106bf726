"""What can run the model that is evaluated. Imports neither."""

from megatron_mesh.errors import UserError

TRANSFORMERS = "transformers"
VLLM = "vllm"
ENGINES = (TRANSFORMERS, VLLM)


def check_engine(engine: str, device: str | None) -> None:
    """Raise UserError for an unknown engine, or one that does not take ``--device``."""
    if engine not in ENGINES:
        raise UserError(f"--engine {engine} must be one of {', '.join(ENGINES)}")
    if engine == VLLM and device is not None:
        raise UserError(
            f"--device {device} is for --engine transformers; vLLM runs on the device that it was built for "
            "(CUDA_VISIBLE_DEVICES chooses a GPU)"
        )
