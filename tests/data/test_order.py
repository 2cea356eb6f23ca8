"""The global order: a permutation per epoch, the same for every way of dividing a batch."""

import random

import numpy as np
import pytest
from data.conftest import make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from bov_lightning.errors import UserError
from data_modules.order import permuted, rows_at
from data_modules.packed import TrainingRows, ValidationRows


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


@pytest.mark.slow
@given(st.integers(1, 50), st.integers(0, 500))
def test_positions_run_on_into_the_next_epoch(n_row, start):
    positions = np.arange(start, start + 20)
    expected = [permuted(np.array([p % n_row]), n_row, 3, p // n_row)[0] for p in positions]
    assert rows_at(positions, n_row, 3).tolist() == expected


N_BATCH = 36
"""Batches of 8 rows: more than two epochs of the corpus below."""


@pytest.fixture(scope="module")
def rows(synthetic, tmp_path_factory):
    corpus = make_corpus(tmp_path_factory.mktemp("order") / "corpus", synthetic)
    corpus.prepare(processes=1)
    return corpus.open_rows("train", corpus.read_manifest())


def global_batches(rows, world: int, micro: int, stops: tuple = (), n_batch: int = N_BATCH) -> list:
    """Each batch of 8 rows, over all ranks, in order; every rank restarts after ``stops``
    micro-batches."""
    n_micro = 8 // (world * micro)
    batches: list[list] = [[] for _ in range(n_batch)]
    states: list = [None] * world
    for rank in range(world):
        at = 0
        for stop in (*stops, n_batch * n_micro):
            loader = TrainingRows(rows, micro, n_batch * n_micro, 7, rank, world)
            if states[rank] is not None:
                loader.load_state_dict(states[rank])
            iterator = iter(loader)
            for i in range(at, stop):
                batches[i // n_micro].append((i % n_micro, rank, next(iterator).tolist()))
            at, states[rank] = stop, loader.state_dict()
    return [[row for _, _, part in sorted(batch) for row in part] for batch in batches]


def test_any_division_of_the_batch_sees_the_same_batches_in_the_same_order(rows):
    expected = global_batches(rows, 1, 8)
    assert len({str(batch) for batch in expected}) == N_BATCH
    for world in (1, 2, 4, 8):
        for micro in (1, 2, 4, 8):
            if world * micro <= 8:
                assert global_batches(rows, world, micro) == expected


@pytest.mark.slow
def test_interrupted_twice_anywhere_the_stream_goes_on_token_for_token(rows):
    expected = global_batches(rows, 1, 8)
    choose = random.Random(0)
    for _ in range(20):
        world, micro = choose.choice([(1, 1), (1, 4), (2, 2), (4, 1), (8, 1)])
        n = N_BATCH * 8 // (world * micro)
        stops = tuple(sorted(choose.sample(range(1, n), 2)))
        assert global_batches(rows, world, micro, stops) == expected
    epoch = len(rows)
    assert 2 * epoch < N_BATCH * 8
    for stops in ((epoch, 2 * epoch), (epoch - 1, epoch + 1)):
        assert global_batches(rows, 1, 1, stops) == expected


def test_a_run_continues_on_another_world_size(rows):
    expected = global_batches(rows, 1, 8)
    loader = TrainingRows(rows, 8, N_BATCH, 7, 0, 1)
    iterator = iter(loader)
    for batch in expected[:5]:
        assert next(iterator).tolist() == batch
    state = loader.state_dict()
    ranks = [TrainingRows(rows, 2, 2 * N_BATCH, 7, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    iterators = [iter(rank) for rank in ranks]
    for batch in expected[5:]:
        found = [next(it).tolist() for _ in range(2) for it in iterators]
        assert [row for part in found for row in part] == batch


def test_three_epochs_give_every_row_once_each(rows):
    n = len(rows)
    seen = rows_at(np.arange(3 * n), n, 7).reshape(3, n)
    for epoch in seen:
        assert sorted(epoch.tolist()) == list(range(n))
    assert not (seen[0] == seen[1]).all()


def test_another_seed_or_corpus_is_refused(rows):
    state = TrainingRows(rows, 2, 10, 7, 0, 1).state_dict()
    for wrong in ({"seed": 8}, {"rows": "other"}):
        with pytest.raises(UserError, match="position means nothing"):
            TrainingRows(rows, 2, 10, 7, 0, 1).load_state_dict(state | wrong)


def test_validation_is_the_same_on_every_world_size(rows):
    n_row = 27
    expected = rows.read(np.arange(n_row)).tolist()
    for world in (1, 2, 4, 8):
        for micro in (1, 3, 8):
            ranks = [ValidationRows(rows, n_row, micro, 0, rank, world) for rank in range(world)]
            sizes = [[len(batch) for batch in rank] for rank in ranks]
            assert all(size == sizes[0] for size in sizes)
            assert len(ranks[0]) == len(sizes[0])
            found = [row for rank in ranks for batch in rank for row in batch.tolist()]
            real = [row for row in found if any(row)]
            assert sorted(real) == sorted(expected)
            assert len(found) - len(real) < world
