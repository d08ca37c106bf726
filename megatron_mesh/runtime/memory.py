"""Report out-of-memory errors once, with remedies."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from megatron_mesh.config.schema import Config
from megatron_mesh.errors import OutOfMemory
from megatron_mesh.runtime import device

logger = logging.getLogger(__name__)


@contextmanager
def explain_out_of_memory(remedies: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Turn torch's out-of-memory error into ``OutOfMemory``. Its traceback goes to the log, at debug level.

    Args:
        remedies: what to try, cheapest first.
    """
    try:
        yield
    except RuntimeError as error:  # torch's own is one
        if not device.is_out_of_memory(error):
            raise
        logger.debug("out of memory", exc_info=True)
        what = str(error).strip().splitlines()[0]
        raise OutOfMemory(f"out of memory: {what}\nwhat helps: {'; '.join(remedies())}") from error


def remedies(config: Config) -> list[str]:
    """What a run with these (resolved) settings can still do to need less memory, cheapest first."""
    training, parallel = config.training, config.parallel
    found = []
    size = training.micro_batch_size
    if size > 1:
        smaller = max(n for n in range(1, size) if not size % n)
        found.append(f"--micro-batch-size {smaller} (the same batch in more parts)")
    if training.recompute_granularity is None:
        found.append("--recompute-granularity selective --recompute-modules core_attn mlp")
    if training.recompute_granularity != "full":
        found.append("--recompute-granularity full (about a third more time)")
    if not training.bf16:
        found.append("--bf16")
    if not parallel.use_distributed_optimizer:
        found.append("--use-distributed-optimizer (on several data-parallel ranks)")
    ranks = 2 * parallel.tensor_model_parallel_size
    if config.model.num_attention_heads % ranks == 0:
        found.append(f"--tensor-model-parallel-size {ranks} --sequence-parallel (with {ranks} GPUs or more)")
    return [*found, "--dry-run shows what each rank needs"]
