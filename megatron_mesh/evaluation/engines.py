"""Names of the engines that can run the evaluated model. This module imports neither of them."""

from megatron_mesh.errors import UserError

TRANSFORMERS = "transformers"
VLLM = "vllm"
ENGINES = (TRANSFORMERS, VLLM)


def check_engine(engine: str, device: str | None) -> None:
    """Raise UserError if the engine is unknown or doesn't support ``--device``."""
    if engine not in ENGINES:
        raise UserError(f"--engine {engine} is unknown; choose from {', '.join(ENGINES)}")
    if engine == VLLM and device is not None:
        raise UserError(
            f"--device {device} is only for --engine transformers; leave it out: vLLM runs on the device "
            "that it was built for (choose a GPU with CUDA_VISIBLE_DEVICES)"
        )
