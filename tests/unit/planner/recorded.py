"""Run Megatron-core's real schedules on one rank, with fake neighbours, and record what they run and send."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mesh.planner.schedule import Step

SHAPE = (2, 1, 4)  # [S, B, H]
GROUPS = ("tp", "cp", "embd", "pos_embd", "pp", "dp_cp")


class Group:
    """Stands in for a process group; the schedules only ask for its size and rank."""

    def __init__(self, size: int = 1, rank: int = 0):
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


class Handle:
    """Handle of a receive that is already complete."""

    def wait(self) -> None:
        pass


class Neighbours:
    """P2P communicator that receives zeros on demand and counts the messages that it sends."""

    def __init__(self, group: Group, config: TransformerConfig):
        self.pp_group, self.config = group, config
        self.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size
        self.sent: Counter[str] = Counter()

    def _send(self, direction: str, tensor: Any) -> None:
        self.sent[direction] += tensor is not None

    def _receive(self, wanted: bool) -> Tensor | None:
        return torch.zeros(SHAPE, requires_grad=True) if wanted else None

    def recv_forward(self, shapes: Any, is_first_stage: bool) -> Any:
        tensor = self._receive(not is_first_stage)
        return [tensor] if isinstance(shapes, list) else tensor

    def recv_backward(self, shapes: Any, is_last_stage: bool) -> Any:
        tensor = self._receive(not is_last_stage)
        return [tensor] if isinstance(shapes, list) else tensor

    def send_forward(self, outputs: Any, is_last_stage: bool) -> None:
        self._send("forward", None if is_last_stage else outputs)

    def send_backward(self, grads: Any, is_first_stage: bool) -> None:
        self._send("backward", None if is_first_stage else grads)

    def send_forward_recv_backward(self, outputs: Any, shapes: Any, is_last_stage: bool) -> Any:
        self.send_forward(outputs, is_last_stage)
        return self.recv_backward(shapes, is_last_stage)

    def send_backward_recv_forward(self, grads: Any, shapes: Any, is_first_stage: bool) -> Any:
        self.send_backward(grads, is_first_stage)
        return self.recv_forward(shapes, is_first_stage)

    def send_forward_recv_forward(
        self, output_tensor: Any, recv_prev: bool, tensor_shape: Any, overlap_p2p_comm: bool = False
    ) -> Any:
        self._send("forward", output_tensor)
        tensor = self._receive(recv_prev)
        return (tensor, {"recv_prev": Handle()} if recv_prev else {}) if overlap_p2p_comm else tensor

    def send_backward_recv_backward(
        self, input_tensor_grad: Any, recv_next: bool, tensor_shape: Any, overlap_p2p_comm: bool = False
    ) -> Any:
        self._send("backward", input_tensor_grad)
        tensor = self._receive(recv_next)
        return (tensor, {"recv_next": Handle()} if recv_next else {}) if overlap_p2p_comm else tensor

    def send_forward_backward_recv_forward_backward(
        self, output_tensor: Any, grad: Any, recv_prev: bool, recv_next: bool, tensor_shape: Any
    ) -> Any:
        self._send("forward", output_tensor)
        self._send("backward", grad)
        return self._receive(recv_prev), self._receive(recv_next)


class Record(torch.autograd.Function):
    """Identity that logs when its forward and its backward run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chunk: int, micro_batch: int, log: list[Step]) -> Tensor:
        ctx.step, ctx.log = Step(True, chunk, micro_batch), log
        log.append(Step(False, chunk, micro_batch))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.log.append(ctx.step)
        return grad, None, None, None


class ToyChunk(torch.nn.Module):
    """A model chunk; the data iterator yields the number of the micro-batch."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, index: int, config: TransformerConfig, log: list[Step]):
        super().__init__()
        self.index, self.config, self.log = index, config, log
        self.weight = torch.nn.Parameter(torch.ones(SHAPE))
        self.input: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self.input = tensors[0]

    def forward(self, micro_batch: int) -> Tensor:
        x = self.weight if self.input is None else self.input * self.weight
        return Record.apply(x, self.index, micro_batch, self.log)


def forward_step(data: Iterator[int], chunk: ToyChunk) -> tuple[Tensor, Any]:
    return chunk(next(data)), lambda output: (output.sum(), {})


def recorded(
    ranks: int, rank: int, chunks: int, micro_batches: int, group: int | None, overlap: bool = False
) -> tuple[tuple[Step, ...], Counter[str]]:
    """Run Megatron-core's schedule on one rank; return its steps and the number of messages sent."""
    config = TransformerConfig(
        num_layers=ranks * chunks,
        hidden_size=SHAPE[-1],
        num_attention_heads=1,
        pipeline_model_parallel_size=ranks,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        microbatch_group_size_per_vp_stage=group or 1,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
        overlap_p2p_comm=overlap,
    )
    log: list[Step] = []
    models = [ToyChunk(index, config, log) for index in range(chunks)]
    pipeline_group = Group(ranks, rank)
    groups = ProcessGroupCollection()
    for name in GROUPS:
        setattr(groups, name, pipeline_group if name == "pp" else Group())
    arguments = {
        "forward_step_func": forward_step,
        "num_microbatches": micro_batches,
        "seq_length": SHAPE[0],
        "micro_batch_size": SHAPE[1],
        "pg_collection": groups,
    }
    iterators = [iter(range(micro_batches)) for _ in range(chunks)]
    neighbours = Neighbours(pipeline_group, config)
    if ranks == 1:
        forward_backward_no_pipelining(model=models, data_iterator=iterators, **arguments)
    else:
        schedule: Any = forward_backward_pipelining_with_interleaving
        if chunks == 1:
            schedule = forward_backward_pipelining_without_interleaving
        schedule(model=models, data_iterator=iterators, p2p_communicator=neighbours, **arguments)
    return tuple(log), neighbours.sent
