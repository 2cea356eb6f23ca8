"""Real processes of a gloo group, for tests."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(rank: int, world: int, port: int, work: Callable, arguments: tuple) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    work(rank, world, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def in_processes(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs ``work(rank, world, *arguments)`` in each of ``world`` processes."""
    mp.spawn(_enter, (world, free_port(), work, arguments), nprocs=world)
