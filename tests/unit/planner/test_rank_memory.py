"""Compare estimated bytes with what autograd, gradient buffers and the optimizer really store."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from megatron_mesh.config.schema import Config
from megatron_mesh.model import MeshGPTModel, build_model
from megatron_mesh.parallel import build_stage
from megatron_mesh.parallel.ring import carry
from megatron_mesh.planner.plan import make_plan
from megatron_mesh.planner.rank_memory import InFlight, activation_bytes, in_flight
from megatron_mesh.planner.schedule import Step
from megatron_mesh.planner.stages import Chunk, Pipeline
from megatron_mesh.recurrence import LoopState
from megatron_mesh.train.optimizer import build_optimizer
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("groups")
TOLERANCE = 0.03  # for the statistics of norms and routers, whose share shrinks with the width
SHAPE = {"hidden_size": 128, "seq_length": 64, "vocab_size": 128}


class SavedTensors:
    """Counts the memory that autograd saves, each storage once and without the model's parameters."""

    def __init__(self, model: torch.nn.Module):
        self._ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def add(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._ours:
            self._storages[storage.data_ptr()] = storage
        return x

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.add, lambda x: x):
            yield

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("modules", [None, ["mlp"]])
@pytest.mark.parametrize("scheme", ["vanilla", "base", "anchor", "static", "mesh"])
def test_activations_of_one_rank(scheme: str, modules: list[str] | None, bf16: bool) -> None:
    selective = {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}
    config = tiny_config(scheme, "2+2R2+2", bf16=bf16, **SHAPE, **selective)
    model = build_model(config)
    tokens = torch.zeros(config.training.micro_batch_size, 64, dtype=torch.int64)
    saved = SavedTensors(model)
    with saved.counting():
        loss = model(tokens, None, None, labels=tokens)
    assert loss.requires_grad
    estimate = make_plan(config, 1).ranks[0].memory.activations
    assert estimate == pytest.approx(saved.bytes, rel=TOLERANCE)


def received(config: Config) -> Tensor:
    """Make a state as received from another rank."""
    model, training = config.model, config.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    shape = (model.seq_length, training.micro_batch_size, model.hidden_size)
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def run_pass(model: MeshGPTModel, index: int, x: Tensor, state: LoopState) -> Tensor:
    """Run a chunk of the ring on its first rank."""
    block = model.decoder
    x = block.enter(index, x, state)
    rotary = model.rotary_pos_emb(len(x))
    return block.passes[index](x, None, rotary_pos_emb=rotary)


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("scheme", ["base", "anchor", "residual", "static", "mesh"])
def test_activations_of_the_rings_chunks(scheme: str, recompute: str | None) -> None:
    """Run the first rank's passes one by one; each has its own graph, which starts at the received state."""
    settings = {"recompute_granularity": recompute, "recompute_num_layers": 1} if recompute else {}
    config = tiny_config(scheme, "2+3R2+1", **SHAPE, **settings)
    model = build_model(config).train()
    state, estimate, real = LoopState(share=carry), 0, 0
    saved = SavedTensors(model)
    for index, layers in enumerate((2, 3, 3, 1)):
        with saved.counting():
            x = saved.add(received(config))  # the schedule holds the input until the backward,
            output = saved.add(run_pass(model, index, x, state))  # and the output that it sent
        assert output.shape == x.shape
        before, real = real, saved.bytes
        chunk = Chunk("", (layers,), enters=(index,))
        estimate += activation_bytes(config, chunk, pipelined=True)
        assert real > before
        assert estimate == pytest.approx(real, rel=TOLERANCE)


def test_in_flight_follows_the_order() -> None:
    """Worked out by hand for chunks of 2 and 3 layers: at most two of the first and one of the second."""
    config = tiny_config("base", "2+2R2+2", **SHAPE)
    chunks = (Chunk("a", (2,)), Chunk("b", (3,)))
    order = [Step(*s) for s in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 1, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1))]
    stages = Pipeline((chunks, chunks), (5, 5), 2, 2)
    a, b = (activation_bytes(config, chunk, pipelined=True) for chunk in chunks)
    assert in_flight(config, stages, 0, order) == InFlight(2 * a + b, micro_batches=2, chunks=3)


def test_full_recomputation_adds_a_layer_at_a_time() -> None:
    plain = tiny_config("mesh", "2+2R2+2", **SHAPE)
    full = tiny_config("mesh", "2+2R2+2", recompute_granularity="full", **SHAPE)
    one_layer = activation_bytes(plain, Chunk("", (1,)), pipelined=False)
    chunk = make_plan(full, 1).pipeline.chunks[0][0]
    stored = activation_bytes(full, chunk, pipelined=False)
    assert make_plan(full, 1).ranks[0].memory.activations == stored + one_layer


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_weights_gradients_and_optimizer(distributed: bool, bf16: bool) -> None:
    config = tiny_config("mesh", "1+2R2+1", bf16=bf16, use_distributed_optimizer=distributed)
    stage = build_stage(config)
    optimizer = build_optimizer(config, stage)
    for parameter in stage.modules[0].parameters():
        parameter.main_grad.fill_(0.01)
    optimizer.step()
    memory = make_plan(config, 1).ranks[0].memory
    assert memory.weights == sum(p.nbytes for p in stage.modules[0].parameters())
    gradients = sum(buffer.grad_data.nbytes for group in stage.groups for buffer in group.buffers)
    assert memory.gradients == pytest.approx(gradients, rel=0.03)  # buffers are padded
    assert memory.optimizer == pytest.approx(optimizer_bytes(optimizer, bf16), rel=0.001)


def optimizer_bytes(optimizer: object, bf16: bool) -> int:
    """Sum the moments and the float32 copies of bfloat16 weights; step counters are a few bytes more."""
    states = optimizer.optimizer.state
    moments = sum(x.nbytes for state in states.values() for x in state.values() if torch.is_tensor(x))
    copies = sum(parameter.nbytes for parameter in states) if bf16 else 0
    return moments + copies


def test_the_distributed_optimizer_shards_its_state() -> None:
    settings = {"global_batch_size": 16, "bf16": True}
    whole = make_plan(tiny_config("mesh", **settings, world_size=4), 4).ranks[0].memory
    sharded = tiny_config("mesh", use_distributed_optimizer=True, **settings, world_size=4)
    memory = make_plan(sharded, 4).ranks[0].memory
    assert memory.optimizer == -(-whole.optimizer // 4)
    assert (memory.weights, memory.gradients) == (whole.weights, whole.gradients)
