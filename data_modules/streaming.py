"""Training on a corpus that is tokenized and packed while it is read.

The source is cut into a fixed number of lanes. A lane reads its own stripe, for ever, and packs its
own rows; a global batch takes equally many rows of every lane. A rank owns a contiguous block of
lanes, so every number of ranks that divides the lanes sees the same global batches.

A lane packs its documents in segments, each by itself. Where it stands is thus a few integers: the
reader's position at the start of the segment, and the rows of it that were given out. Resuming
tokenizes one segment per lane again.
"""

import multiprocessing
import queue
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from bov_lightning.distributed.ranks import Ranks
from bov_lightning.errors import UserError
from bov_lightning.kinds import COUNT, PATH, SEED, Range
from data_modules.corpus import Corpus
from data_modules.lanes import serve, start_lane
from data_modules.packed import CorpusDataModule
from data_modules.packing import PackingConfig
from data_modules.reader import OnError
from data_modules.sources import TextSource
from data_modules.tokenizer import TokenizerConfig


class StreamingRows:
    """Micro-batches (micro, T+1), int64, of this rank's lanes.

    The state is that of *all* lanes, so that any number of ranks can continue: `state_dict` gathers
    it from the other ranks.
    """

    PREFETCH = 2
    """Steps that worker processes work ahead."""

    def __init__(
        self, corpus: Corpus, micro: int, n_accumulate: int, n_step: int, n_lane: int,
        n_worker: int, rank: int, world: int,
    ):  # fmt: skip
        """``n_accumulate`` micro-batches make a step; ``n_step`` steps make the run."""
        batch = micro * n_accumulate * world
        if n_lane % world:
            raise UserError(
                f"data: {n_lane} lanes cannot be shared by {world} devices: n_lane must be a "
                "multiple of the number of devices"
            )
        if batch % n_lane:
            near = [n for n in range(world, batch + 1, world) if batch % n == 0]
            best = min(near, key=lambda n: abs(n - n_lane))
            raise UserError(
                f"data: a global batch of {batch} rows cannot take equally many from {n_lane} "
                f"lanes: the nearest n_lane that divides it is {best}"
            )
        self.corpus, self.micro, self.n_accumulate, self.n_step = (
            corpus,
            micro,
            n_accumulate,
            n_step,
        )
        self.n_lane, self.n_worker, self.world = n_lane, n_worker, world
        self.rows_per_lane = batch // n_lane
        share = n_lane // world
        self.lanes = list(range(rank * share, (rank + 1) * share))
        self.step = 0
        self.states: dict[int, list | None] = dict.fromkeys(range(n_lane))

    def __len__(self) -> int:
        return self.n_step * self.n_accumulate

    def __iter__(self) -> Iterator[Tensor]:
        steps = self._from_workers() if self.n_worker else self._in_process()
        try:
            while self.step < self.n_step:
                rows, states = next(steps)
                for i in range(self.n_accumulate):
                    if i == self.n_accumulate - 1:
                        self.step += 1
                        self.states.update(states)
                    batch = rows[i * self.micro : (i + 1) * self.micro]
                    yield torch.from_numpy(batch.astype(np.int64))
        finally:
            steps.close()

    def _in_process(self) -> Iterator[tuple[np.ndarray, dict[int, list]]]:
        served = {i: start_lane(self.corpus, i, self.n_lane, self.states[i]) for i in self.lanes}
        while True:
            blocks = [
                np.stack([next(rows) for _ in range(self.rows_per_lane)])
                for _, rows in served.values()
            ]
            yield np.concatenate(blocks), {i: lane.state for i, (lane, _) in served.items()}

    def _from_workers(self) -> Iterator[tuple[np.ndarray, dict[int, list]]]:
        context = multiprocessing.get_context("spawn")
        n_worker = min(self.n_worker, len(self.lanes))
        workers = []
        for w in range(n_worker):
            own = self.lanes[w::n_worker]
            out = context.Queue(maxsize=self.PREFETCH * len(own))
            states = {i: self.states[i] for i in own}
            arguments = (self.corpus, states, self.n_lane, self.rows_per_lane, out)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            workers.append((process, out))
        try:
            while True:
                blocks, states = [], {}
                for i, lane in enumerate(self.lanes):
                    block, states[lane] = _take(*workers[i % n_worker])
                    blocks.append(block)
                yield np.concatenate(blocks), states
        finally:
            for process, out in workers:
                process.terminate()
                out.cancel_join_thread()
            for process, _ in workers:
                process.join()

    def state_dict(self) -> dict[str, Any]:
        """Step and state of every lane, whoever owns it."""
        states = self.states
        if self.world > 1:
            own = {i: self.states[i] for i in self.lanes}
            states = {i: s for part in Ranks.of_job().gather(own) for i, s in part.items()}
        return {
            "step": self.step,
            "rows_per_step": self.rows_per_lane * self.n_lane,
            "lanes": [states[i] for i in range(self.n_lane)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues; other lanes or another global batch are a `UserError`."""
        for name, found, own in (
            ("n_lane", len(state["lanes"]), self.n_lane),
            ("rows per step", state["rows_per_step"], self.rows_per_lane * self.n_lane),
        ):
            if found != own:
                raise UserError(
                    f"the checkpoint was trained with {name} {found} of data, now {own}: its "
                    "position means nothing there; use a new run.name or --resume never"
                )
        self.step = state["step"]
        self.states = dict(enumerate(state["lanes"]))


def _take(process, out) -> tuple[np.ndarray, list]:
    """The next block of a worker; its error, or its death, is a `UserError`."""
    while True:
        try:
            found = out.get(timeout=5)
        except queue.Empty:
            if process.is_alive():
                continue
            raise UserError(
                f"data: a reading process ended with code {process.exitcode}; start again to "
                "continue, perhaps with fewer data.init_args.n_worker"
            ) from None
        if isinstance(found, str):
            raise UserError(found)
        return found


class StreamingDataModule(CorpusDataModule):
    """Tokenizes and packs training text on the fly; only validation rows are kept on disk."""

    def __init__(
        self,
        directory: Annotated[str, PATH],
        source: TextSource,
        tokenizer: TokenizerConfig = TokenizerConfig(),
        packing: PackingConfig = PackingConfig(buffer=128),
        n_lane: Annotated[int, Range(1, 1_000_000)] = 64,
        n_worker: Annotated[int, Range(0, 10_000)] = 2,
        on_error: OnError = "error",
        sequence_len: Annotated[int, Range(1, 2**24)] = 2048,
        micro: Annotated[int, COUNT] = 16,
        seed: Annotated[int, SEED] = 0,
        validation_tokens: Annotated[int | None, COUNT] = None,
    ):
        """
        Args:
            directory: where tokenizer and packed validation rows lie; made when missing.
            source: the documents; they come in the source's own order, so shuffle it beforehand.
            tokenizer: trained on the training documents, or brought along.
            packing: how documents fill rows; buffer is also the segment that a lane packs at once.
            n_lane: lanes; a multiple of the number of devices, and a divisor of the global batch
                in rows. A run must keep it.
            n_worker: processes per device that read ahead; 0: read between steps.
            on_error: whether an unreadable row of the source is an error or counted and left out.
            sequence_len: tokens per row; filled from model.config.sequence_len.
            micro: rows per micro-batch; filled from batch.micro.
            seed: filled from seed; the order of a stream does not depend on it.
            validation_tokens: at most so many; filled from validation.tokens.
        """
        corpus = Corpus(
            directory, source, tokenizer, packing, sequence_len, 1, on_error, splits=("val",)
        )
        super().__init__(corpus, micro, seed, validation_tokens)
        self.n_lane, self.n_worker = n_lane, n_worker

    def train_dataloader(self) -> StreamingRows:
        """The whole run, as one epoch."""
        trainer = self.trainer
        return StreamingRows(
            self.corpus, self.micro, trainer.accumulate_grad_batches, trainer.max_steps,
            self.n_lane, self.n_worker, trainer.global_rank, trainer.world_size,
        )  # fmt: skip
