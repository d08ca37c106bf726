"""A scheme that the package has never seen works everywhere from its attributes alone."""

from collections.abc import Iterator

import pytest
import torch
from megatron_mesh.model.count import count_parameters
from megatron_mesh.model.flops import forward_flops_per_token
from torch import Tensor, nn

from megatron_mesh.config.layout import non_embedding_parameters
from megatron_mesh.config.schema import Config
from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert.tensors import entries
from megatron_mesh.hf.modeling.configuration_mesh import MeshConfig
from megatron_mesh.hf.modeling.modeling_mesh import MeshModel
from megatron_mesh.metrics.meters import RouterMeter
from megatron_mesh.model import build_model, build_on_meta
from megatron_mesh.planner.costs import own_exchange
from megatron_mesh.planner.plan import make_plan
from megatron_mesh.recurrence import SCHEMES, LoopState, RecurrenceOptions, Scheme
from megatron_mesh.recurrence.schemes import Draw
from megatron_mesh.runtime.distributed import process_groups
from tests.helpers import tiny_config

LAYERS, LOOPS, HIDDEN = "1+2R3+1", 3, 32
STATE = 2 * 16 * HIDDEN * 4  # bytes of [S, B, H] in float32


class Gate(Scheme):
    """Scales each loop's output by one learned number. No other scheme has these attributes."""

    formula = "g h_m"
    full_precision = True
    shards_states = True

    def __init__(self, hidden_size: int, loops: int, options: RecurrenceOptions):
        super().__init__(hidden_size, loops, options)
        self.gate = nn.Parameter(torch.empty(1))

    @classmethod
    def num_parameters(cls, hidden_size: int, loops: int, slots: int) -> int:
        return 1

    @classmethod
    def enter_flops(cls, index: int, hidden_size: int, slots: int) -> int:
        return hidden_size if index > 1 else 0

    @classmethod
    def makes_new_state(cls, index: int) -> bool:
        return index > 1

    @classmethod
    def saved_states(cls, loops: int) -> int:
        return loops

    def init_parameters(self, draw: Draw) -> None:
        nn.init.ones_(self.gate)

    def cycle(self, t: int, o: Tensor, state: LoopState) -> Tensor:
        return o * self.gate.to(o.dtype) if t else o


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with process_groups(Config()):
        yield


@pytest.fixture(autouse=True)
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(SCHEMES, "gate", Gate)
    yield


def test_parameters_and_flops() -> None:
    ours, base = tiny_config("gate", LAYERS), tiny_config("base", LAYERS)
    assert count_parameters(build_on_meta(ours))["recurrence"] == 1
    assert non_embedding_parameters(ours.model) == non_embedding_parameters(base.model) + 1
    assert forward_flops_per_token(ours.model) == forward_flops_per_token(base.model) + LOOPS * HIDDEN


def test_precision_and_weight_decay() -> None:
    model = build_model(tiny_config("gate", LAYERS, bf16=True))
    (parameter,) = model.decoder.recurrence.parameters()
    assert parameter.dtype == torch.float32 and parameter.no_weight_decay
    (entry,) = [e for e in entries(tiny_config("gate", LAYERS).model) if "recurrence" in e.name]
    assert entry.full_precision


def activations(scheme: str, world_size: int = 1, **settings: int) -> list[int]:
    config = tiny_config(scheme, LAYERS, world_size=world_size, **settings)
    return [rank.memory.activations for rank in make_plan(config, world_size).ranks]


def test_memory_of_one_process() -> None:
    assert activations("gate")[0] - activations("base")[0] == LOOPS * STATE


def test_memory_of_a_pipeline_is_on_the_first_rank() -> None:
    ours, base = (activations(scheme, 2, pipeline_model_parallel_size=2) for scheme in ("gate", "base"))
    assert ours[0] > base[0] and (ours[0] - base[0]) % STATE == 0
    assert ours[1] == base[1]


def test_tensor_parallel_ranks_divide_its_work() -> None:
    two = {"world_size": 2, "tensor_model_parallel_size": 2}
    assert own_exchange(tiny_config("gate", LAYERS, **two))
    assert not own_exchange(tiny_config("base", LAYERS, **two))
    tiny_config("base", LAYERS, seq_length=15, **two)
    with pytest.raises(UserError, match="--seq-length"):
        tiny_config("gate", LAYERS, seq_length=15, **two)


def test_it_has_no_memory() -> None:
    with pytest.raises(UserError, match="--mesh-slots"):
        tiny_config("gate", LAYERS, mesh_slots=5)
    scheme = Gate(HIDDEN, LOOPS, RecurrenceOptions())
    assert RouterMeter(scheme).scheme is None
    assert LoopState().kept == {}


@pytest.mark.parametrize("varies", [True, False])
def test_loops_of_a_trained_model(varies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gate, "per_loop_parameters", not varies)
    config = MeshConfig(
        recurrence="gate",
        vocab_size=8,
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=8,
        num_loops=2,
    )
    model = MeshModel(config)
    if varies:
        model.set_num_loops(3)
        assert len(model.passes) == 5
    else:
        with pytest.raises(ValueError, match="num_loops=3 is not possible"):
            model.set_num_loops(3)
