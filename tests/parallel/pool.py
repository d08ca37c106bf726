"""Pools of worker processes that are reused: importing torch and Megatron takes longer than most cases."""

import gc
import itertools
import multiprocessing
import os
import signal
import socket
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

_pools: dict[int, "Pool"] = {}


class WorkerError(Exception):
    """A case failed in a worker; the text is that worker's traceback."""


class Pool:
    """``size`` gloo processes, which all call the same function with the same arguments."""

    def __init__(self, size: int):
        # The workers are forks of a process that has imported everything and done nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])
        port = free_port()
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, port, there))
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 400) -> list[Any]:
        """Return the results of ``function(*args)`` on each rank; raise WorkerError if any of them fails."""
        for connection in self.connections:
            connection.send((function, args))
        results: dict[int, Any] = {}
        while len(results) < len(self.connections):
            waiting = [c for rank, c in enumerate(self.connections) if rank not in results]
            ready = wait(waiting, timeout)
            if not ready:
                self.close()
                raise TimeoutError(f"{function.__name__} took longer than {timeout} s")
            for connection in ready:
                rank = self.connections.index(connection)  # type: ignore[arg-type]
                fine, results[rank] = self._receive(connection)  # type: ignore[arg-type]
                if not fine:
                    self.close()  # the others are waiting for a collective that never comes
                    raise WorkerError(f"rank {rank} of {len(self.connections)}:\n{results[rank]}")
        return [results[rank] for rank in range(len(results))]

    def _receive(self, connection: Connection) -> tuple[bool, Any]:
        try:
            return connection.recv()
        except EOFError:
            return False, "the process died"

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            # Kill its children too: saving starts a helper process that would outlive it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        for key in [key for key, pool in _pools.items() if pool is self]:
            del _pools[key]


def pool(size: int) -> Pool:
    """Return the pool of that size; it is started when first used."""
    if size not in _pools:
        _pools[size] = Pool(size)
    return _pools[size]


def close_all() -> None:
    """End all pools."""
    for each in list(_pools.values()):
        each.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _work(rank: int, size: int, port: int, connection: Connection) -> None:
    """Run the functions that arrive through the pipe until it closes."""
    os.setsid()
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    import datetime

    import torch
    import torch.distributed as dist

    from megatron_mesh.runtime import device

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    device.prepare()
    timeout = datetime.timedelta(seconds=300)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timeout)
    for number in itertools.count():
        try:
            function, args = connection.recv()
        except EOFError:
            return
        # Each case gets a new world, because the threads of process groups only end with their world.
        case = dist.PrefixStore(str(number), store)
        dist.init_process_group(device.backend(), store=case, rank=rank, world_size=size, timeout=timeout)
        try:
            connection.send((True, function(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        gc.collect()  # models and their groups form reference cycles
        if dist.is_initialized():  # the case may have destroyed it
            dist.destroy_process_group()
