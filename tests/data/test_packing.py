"""Best-fit packing against the plain search that it replaces."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.packing import PackingCounts, pack_best_fit


def plain_best_fit(documents: list[np.ndarray], row_len: int, buffer_size: int) -> list[list[int]]:
    """The paper's loop: search the whole buffer for every document."""
    documents, buffer, rows = list(documents), [], []
    while True:
        row: list[int] = []
        while len(row) < row_len:
            while documents and len(buffer) < buffer_size:
                buffer.append(documents.pop(0))
            if not buffer:
                return rows
            space = row_len - len(row)
            best, best_len = -1, 0
            for i, ids in enumerate(buffer):
                if best_len < len(ids) <= space:
                    best, best_len = i, len(ids)
            if best < 0:
                best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
            row += buffer.pop(best)[:space].tolist()
        rows.append(row)


documents_strategy = st.lists(st.integers(1, 40), max_size=60).map(
    lambda lengths: [
        np.arange(100 * i, 100 * i + n, dtype=np.uint16) for i, n in enumerate(lengths)
    ]
)


@settings(deadline=None)
@given(documents_strategy, st.integers(1, 50), st.integers(1, 12))
def test_rows_are_those_of_the_plain_search(documents, row_len, buffer_size):
    counts = PackingCounts()
    rows = [row.tolist() for row in pack_best_fit(documents, row_len, buffer_size, counts)]
    assert rows == plain_best_fit(documents, row_len, buffer_size)
    assert counts.rows == len(rows)
    assert counts.tokens == sum(map(len, documents))
    assert counts.tokens == len(rows) * row_len + counts.cropped
