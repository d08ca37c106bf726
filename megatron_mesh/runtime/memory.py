"""Turn out-of-memory errors into one message with remedies."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from megatron_mesh.config.schema import Config
from megatron_mesh.errors import OutOfMemory
from megatron_mesh.runtime import device

logger = logging.getLogger(__name__)


@contextmanager
def explain_out_of_memory(remedies: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Turn torch's out-of-memory error into ``OutOfMemory``. Its traceback is logged at debug level.

    Args:
        remedies: settings to try, cheapest first.
    """
    try:
        yield
    except RuntimeError as error:  # the base class of torch's own error
        if not device.is_out_of_memory(error):
            raise
        logger.debug("out of memory", exc_info=True)
        reason = str(error).strip().splitlines()[0]
        raise OutOfMemory(f"out of memory: {reason}\ntry: {'; '.join(remedies())}") from error


def remedies(config: Config) -> list[str]:
    """List what would make a run with these (resolved) settings need less memory, cheapest first."""
    training, parallel = config.training, config.parallel
    found = []
    size = training.micro_batch_size
    if size > 1:
        smaller = max(n for n in range(1, size) if not size % n)
        found.append(f"--micro-batch-size {smaller} (the same global batch in more micro-batches)")
    if training.recompute_granularity is None:
        found.append("--recompute-granularity selective --recompute-modules core_attn mlp")
    if training.recompute_granularity != "full":
        found.append("--recompute-granularity full (steps take about a third longer)")
    if not training.bf16:
        found.append("--bf16")
    if not parallel.use_distributed_optimizer:
        found.append("--use-distributed-optimizer (with several data-parallel ranks)")
    ranks = 2 * parallel.tensor_model_parallel_size
    if config.model.num_attention_heads % ranks == 0:
        found.append(f"--tensor-model-parallel-size {ranks} --sequence-parallel (needs {ranks} or more GPUs)")
    return [*found, "--dry-run shows what each rank needs"]
