"""The global order: a permutation per epoch, the same for every way of dividing a batch."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.order import permuted, rows_at
from data_modules.packed import TrainingRows


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 5))
def test_every_row_comes_once_per_epoch(n, seed, epoch):
    assert sorted(permuted(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


def test_epochs_and_seeds_differ_and_look_shuffled():
    n = 10_000
    orders = [permuted(np.arange(n), n, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, order in enumerate(orders):
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05
        for other in orders[:i]:
            assert (order == other).mean() < 0.01
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.05


@given(st.integers(1, 50), st.integers(0, 500))
def test_positions_run_on_into_the_next_epoch(n_row, start):
    positions = np.arange(start, start + 20)
    expected = [permuted(np.array([p % n_row]), n_row, 3, p // n_row)[0] for p in positions]
    assert rows_at(positions, n_row, 3).tolist() == expected


def global_batches(world: int, micro: int, restart_at: int | None = None) -> list[list[int]]:
    """The rows of each batch of 24, collected over ranks that restart once."""
    rows = np.arange(100, dtype=np.uint16)[:, None]
    n_micro = 24 // (world * micro)
    batches = [[] for _ in range(10)]
    for rank in range(world):
        loader = TrainingRows(rows, micro, 10 * n_micro, 7, rank, world)
        iterator = iter(loader)
        for i in range(10 * n_micro):
            if restart_at is not None and i == restart_at * n_micro:
                state = loader.state_dict()
                loader = TrainingRows(rows, micro, 10 * n_micro, 7, rank, world)
                loader.load_state_dict(state)
                iterator = iter(loader)
            batches[i // n_micro] += next(iterator)[:, 0].tolist()
    return [sorted(batch) for batch in batches]


def test_any_division_of_the_batch_sees_the_same_batches():
    expected = global_batches(1, 24)
    assert len({tuple(batch) for batch in expected}) == 10
    for world, micro in ((1, 4), (2, 12), (3, 2), (4, 6)):
        assert global_batches(world, micro) == expected
        assert global_batches(world, micro, restart_at=4) == expected
