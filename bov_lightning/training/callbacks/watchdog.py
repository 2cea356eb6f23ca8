"""Names the ranks that hold up a run before a time-out kills it."""

import json
import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from bov_lightning.console import say


class Watchdog(Callback):
    """Notes what this rank does, and tells the others when it has not moved on for long.

    Ranks wait for each other in collectives, so that all of them stop moving when one does. Each
    then says where it is through the store of the process group, and rank 0 names those that are
    behind. Until then nothing is sent.
    """

    def __init__(self, late_after_s: float):
        """``late_after_s``: seconds without progress before anything is said."""
        self.late_after_s = late_after_s
        self.count, self.place, self.moved_at = 0, "starting", time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Starts to watch, where there is anybody to wait for."""
        if trainer.world_size > 1 and self._thread is None:
            arguments = (trainer.global_rank, trainer.world_size)
            self._thread = threading.Thread(target=self._watch, args=arguments, daemon=True)
            self._thread.start()
        self.note(f"step {trainer.global_step + 1}: waiting for data")

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        """The data is there."""
        self.note(f"step {trainer.global_step + 1}: forward and backward")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """The step is done, and nobody has waited for the others yet."""
        self.note(f"step {trainer.global_step + 1}: waiting for data")

    def on_validation_batch_start(self, trainer, module, batch, batch_index, *arguments) -> None:
        """One more batch."""
        self.note(f"validation after step {trainer.global_step}: batch {batch_index}")

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Stops to watch."""
        self._stop.set()

    def note(self, place: str) -> None:
        """This rank has moved on to ``place``."""
        self.count, self.place, self.moved_at = self.count + 1, place, time.monotonic()

    def _watch(self, rank: int, world: int) -> None:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        reported = -1
        while not self._stop.wait(min(1.0, self.late_after_s / 4)):
            if time.monotonic() - self.moved_at < self.late_after_s or self.count == reported:
                continue
            reported = self.count
            # A connection of its own: that of the process group may be waiting for something.
            store = dist.TCPStore(
                *address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30)
            )
            here = {"count": self.count, "place": self.place, "host": socket.gethostname()}
            store.set(f"watchdog/{rank}", json.dumps(here))
            if rank == 0:
                # The others notice within the same moments.
                self._stop.wait(min(5.0, self.late_after_s))
                self._report(store, world)

    def _report(self, store: dist.TCPStore, world: int) -> None:
        found, silent = {}, []
        for rank in range(world):
            if store.check([f"watchdog/{rank}"]):
                found[rank] = json.loads(store.get(f"watchdog/{rank}"))
            else:
                silent.append(rank)
        furthest = max(here["count"] for here in found.values())
        late = {rank: here for rank, here in found.items() if here["count"] < furthest}
        lines = [f"no progress for {self.late_after_s:.0f} s; rank 0 is at {self.place}"]
        lines += [f"  rank {r} on {h['host']} is late: {h['place']}" for r, h in late.items()]
        lines += [f"  rank {rank} does not answer: its process hangs or is gone" for rank in silent]
        if not late and not silent:
            lines.append("  all ranks are at the same place: a collective or the device hangs")
        say("\n".join(lines))
