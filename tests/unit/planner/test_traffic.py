"""Compare estimated traffic with the collectives of real steps, in a world whose other ranks are fake."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mesh.config.schema import Config
from megatron_mesh.data import Batch
from megatron_mesh.parallel import build_stage
from megatron_mesh.planner.plan import make_plan
from megatron_mesh.runtime import device
from megatron_mesh.train.step import run_batch
from tests.helpers import tiny_config

# Bytes that the data-parallel group reduces besides gradients: token counts.
SCALARS = 64


@contextmanager
def fake_ranks(config: Config, world_size: int) -> Iterator[None]:
    """Set up Megatron's groups with this process as rank 0; collectives do nothing."""
    device.prepare()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Counts the bytes that ring algorithms would send, by process group."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("c10d::")
        if name in ("allreduce_", "allreduce_coalesced_"):
            self._add(args[1], 2 * sum(tensor.nbytes for tensor in args[0]))
        elif name == "_allgather_base_":
            self._add(args[2], args[0].nbytes)
        elif name == "_reduce_scatter_base_":
            self._add(args[2], args[1].nbytes)
        elif name in ("allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_"):
            whole = args[0] if name.startswith("allgather") else args[1]
            self._add(args[2], sum(tensor.nbytes for tensor in whole))
        else:
            assert name == "broadcast_" or not func.name().startswith("c10d::"), name
        return func(*args, **(kwargs or {}))

    def _add(self, boxed_group: Any, whole: int) -> None:
        group = dist.ProcessGroup.unbox(boxed_group)
        self.bytes[group.group_name] += whole * (group.size() - 1) / group.size()


def sent_in_a_step(config: Config, world_size: int) -> tuple[float, float]:
    """Return the bytes that rank 0 sends in its tensor- and data-parallel groups in a step."""
    shape = (config.training.micro_batch_size, config.model.seq_length)
    zeros = torch.zeros(shape, dtype=torch.int64)
    batch = Batch(tokens=zeros, labels=zeros, loss_mask=torch.ones(shape), position_ids=zeros)
    with fake_ranks(config, world_size), Sent() as sent:
        stage = build_stage(config)
        sent.bytes.clear()  # don't count building
        run_batch(stage, iter([batch] * 8), config.training)
        if config.parallel.use_distributed_optimizer:
            for group in stage.groups:  # as at the end of the optimizer's step
                group.start_param_sync(force_sync=True)
        tensor = parallel_state.get_tensor_model_parallel_group().group_name
        data = parallel_state.get_data_parallel_group(with_context_parallel=True).group_name
        return sent.bytes[tensor], sent.bytes[data]


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("scheme", ["vanilla", "anchor", "static", "mesh"])
def test_tensor_parallel_bytes(scheme: str, sequence_parallel: bool, recompute: str) -> None:
    settings = {
        "none": {},
        "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "full": {"recompute_granularity": "full"},
    }[recompute]
    config = tiny_config(
        scheme,
        "1+2R2+1",
        world_size=2,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        **settings,
    )
    real, _ = sent_in_a_step(config, 2)
    assert make_plan(config, 2).ranks[0].traffic.tensor == real


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_data_parallel_bytes(distributed: bool, bf16: bool) -> None:
    config = tiny_config("mesh", world_size=4, use_distributed_optimizer=distributed, bf16=bf16)
    _, real = sent_in_a_step(config, 4)
    traffic = make_plan(config, 4).ranks[0].traffic
    assert (traffic.parameters > 0) is distributed
    # The distributed optimizer pads its buffers.
    assert traffic.gradients + traffic.parameters == pytest.approx(real, rel=0.03, abs=SCALARS)


def test_tied_embeddings_are_summed_over_the_ends() -> None:
    settings = {"pipeline_model_parallel_size": 3, "untie_embeddings_and_output_weights": False}
    plan = make_plan(tiny_config("base", "1+3R1+1", world_size=3, **settings), 3)
    assert [rank.traffic.ties for rank in plan.ranks] == [128 * 32 * 4, 0, 128 * 32 * 4]
