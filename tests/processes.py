"""Real processes of a gloo group, for tests. Each is new, so that nothing of a test stays behind
for the next."""

import contextlib
import json
import os
import select
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import Bov, Call


def _enter(rank: int, world: int, folder: str, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    # They meet in a file: a port that is free now may be another's by then.
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    found = work(rank, world, *arguments)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def in_processes(world: int, work: Callable, *arguments: Any) -> list[Any]:
    """What ``work(rank, world, *arguments)`` returns in each of ``world`` processes, through JSON.

    Raises:
        AssertionError: one of them failed; with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        given = (world, folder, work, arguments)
        ranks = [stack.enter_context(Call(_enter, rank, *given)) for rank in range(world)]
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            waiting = [rank for rank, code in zip(ranks, codes, strict=True) if code is None]
            select.select(waiting, [], [])
        # The others only wait for one that has failed.
        for rank, code in enumerate(codes):
            assert not code, f"rank {rank} ended with {code}:\n{ranks[rank].err}"
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


class BovOnRanks:
    """The command ``bov`` in several processes that find each other as those of torchrun do.

    Used as `forks.Bov` is.

    Args:
        world: number of processes.
        arguments: of the command, the same for all.
    """

    def __init__(self, world: int, *arguments: str):
        # As in torchrun, whoever starts the ranks keeps the store: nobody can take its port.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port, "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0,
        }  # fmt: skip
        self.ranks: list[Bov] = []
        for rank in range(world):
            own = common | {"RANK": rank, "LOCAL_RANK": rank}
            variables = os.environ | {name: str(value) for name, value in own.items()}
            self.ranks.append(Bov(*arguments, env=variables))

    def poll(self) -> int | None:
        """0, or the exit code of one that has failed; None while they run."""
        codes = [rank.poll() for rank in self.ranks]
        return next(filter(None, codes), None if None in codes else 0)

    def wait(self, timeout: float = 300) -> list[int]:
        """The exit codes; the first one may need so many seconds, and the others a minute more."""
        return [rank.wait(timeout if i == 0 else 60) for i, rank in enumerate(self.ranks)]

    @property
    def printed(self) -> str:
        """What they have written so far, one after the other."""
        return "".join(rank.out + rank.err for rank in self.ranks)

    def __enter__(self) -> "BovOnRanks":
        return self

    def __exit__(self, *exception) -> None:
        for rank in self.ranks:
            rank.__exit__(*exception)


def bov_on_ranks(world: int, *arguments: str) -> str:
    """What the command prints on all ranks, on which it must succeed."""
    with BovOnRanks(world, *arguments) as running:
        codes = running.wait()
        assert not any(codes), running.printed
        return running.printed
