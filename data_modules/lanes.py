"""Lanes: the parts of a stream. Worker processes import this, so it imports nothing heavy."""

from collections.abc import Iterator

import numpy as np

from bov_lightning.errors import UserError
from data_modules.corpus import Corpus, packing_tokenizer
from data_modules.packing import PackingCounts, pack
from data_modules.reader import open_stripe
from data_modules.tokenizer import encode_documents


class Lane:
    """Packed rows of one stripe of the training documents, without end."""

    def __init__(self, corpus: Corpus, index: int, n_lane: int):
        self.corpus = corpus
        self.reader = open_stripe(
            corpus.source, "train", index, n_lane, corpus.on_error, forever=True
        )
        self.segment_start = self.reader.state
        self.rows_given = 0

    @property
    def state(self) -> list:
        """The reader's state at the start of the segment, and the rows given since."""
        return [self.segment_start, self.rows_given]

    @state.setter
    def state(self, state: list) -> None:
        self.segment_start, self.rows_given = state
        self.reader.state = self.segment_start

    def __iter__(self) -> Iterator[np.ndarray]:
        tokenizer = packing_tokenizer(self.corpus.tokenizer_directory)
        packing, row_len = self.corpus.packing, self.corpus.sequence_len + 1
        documents = iter(self.reader)
        skip, barren = self.rows_given, 0
        while True:
            segment = [next(documents) for _ in range(packing.buffer)]
            counts = PackingCounts()
            encoded = encode_documents(tokenizer, segment)
            for i, row in enumerate(pack(encoded, row_len, packing, counts)):
                if i >= skip:
                    self.rows_given = i + 1
                    yield row
            barren = 0 if counts.rows else barren + 1
            if barren > 100:
                raise UserError(
                    f"data: {packing.buffer} documents do not fill a row of {row_len - 1} tokens: "
                    "raise data.init_args.packing.buffer"
                )
            self.segment_start, self.rows_given, skip = self.reader.state, 0, 0


def start_lane(
    corpus: Corpus, index: int, n_lane: int, state: list | None
) -> tuple[Lane, Iterator[np.ndarray]]:
    """A lane that continues at ``state``, and the iterator over its rows."""
    lane = Lane(corpus, index, n_lane)
    if state is not None:
        lane.state = state
    return lane, iter(lane)


def serve(corpus: Corpus, lanes: dict[int, list | None], n_lane: int, n_row: int, out) -> None:
    """In a worker process: puts ``n_row`` rows of each lane in turn, with the lane's state."""
    try:
        served = {i: start_lane(corpus, i, n_lane, state) for i, state in lanes.items()}
        while True:
            for lane, rows in served.values():
                block = np.stack([next(rows) for _ in range(n_row)])
                out.put((block, lane.state))
    except UserError as error:
        out.put(str(error))
    except KeyboardInterrupt:
        pass
