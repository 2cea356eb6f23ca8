"""Real processes of a gloo group, for tests.

They are forked out of a server that has imported everything, since importing takes seconds. Each
is new, so that nothing of a test stays behind for the next.
"""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forks import Bov

multiprocessing.set_forkserver_preload([
    "bov_lightning.training.fit", "evaluation.callback", "torch.distributed.fsdp",
    "torch.distributed.tensor.debug", "pytest",
])  # fmt: skip


def _enter(
    rank: int, world: int, folder: str, variables: dict[str, str], work: Callable, arguments: tuple
) -> None:
    os.environ.clear()
    os.environ.update(variables)
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
        mp.ProcessException: one of them failed; with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (world, folder, dict(os.environ), work, arguments)
        mp.start_processes(_enter, given, nprocs=world, start_method="forkserver")
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
