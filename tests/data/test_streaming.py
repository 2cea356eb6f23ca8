"""Streams: the same global batches for every number of ranks, from any point, twice in a row."""

import itertools
import json
import random

import pytest
from data.broken import BreaksAfter
from data.conftest import make_corpus

from bov_lightning.errors import UserError
from data_modules.packing import PackingConfig
from data_modules.reader import open_stripe
from data_modules.sources import StandardLibrary
from data_modules.streaming import StreamingRows
from data_modules.tokenizer import read_tokenizer

N_STEP, BATCH, N_LANE = 14, 16, 8


@pytest.fixture(scope="module", params=["best_fit", "concat"])
def corpus(request, synthetic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "corpus"
    packing = PackingConfig(request.param, buffer=8)
    corpus = make_corpus(folder, synthetic, packing=packing, n_shard=1, splits=("val",))
    corpus.prepare(processes=1)
    return corpus


def ranks_of(corpus, world: int, micro: int, n_worker: int = 0) -> list[StreamingRows]:
    n_accumulate = BATCH // (micro * world)
    return [
        StreamingRows(corpus, micro, n_accumulate, N_STEP, N_LANE, n_worker, rank, world)
        for rank in range(world)
    ]


def gathered_state(ranks: list[StreamingRows]) -> dict:
    """What `state_dict` gathers where the ranks are processes of their own."""
    states = {lane: rank.states[lane] for rank in ranks for lane in rank.lanes}
    ranks[0].world, ranks[0].states = 1, states
    return json.loads(json.dumps(ranks[0].state_dict()))


def global_batches(corpus, parts: list[tuple[int, int, int]], n_worker: int = 0) -> list:
    """The batches of a run in parts: (world, micro, steps until the next part)."""
    batches, state = [], None
    for world, micro, n_step in parts:
        ranks = ranks_of(corpus, world, micro, n_worker)
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        iterators = [iter(rank) for rank in ranks]
        for _ in range(n_step):
            by_rank = [
                [row for _ in range(BATCH // (micro * world)) for row in next(it).tolist()]
                for it in iterators
            ]
            batches.append([row for part in by_rank for row in part])
        state = gathered_state(ranks)
        for iterator in iterators:
            iterator.close()
    return batches


@pytest.fixture(scope="module")
def expected(corpus):
    return global_batches(corpus, [(1, 16, N_STEP)])


@pytest.mark.slow
def test_every_number_of_ranks_sees_the_same_global_batches(corpus, expected):
    assert len({str(batch) for batch in expected}) == N_STEP
    for world in (1, 2, 4, 8):
        for micro in (1, 2, 16 // world):
            assert global_batches(corpus, [(world, micro, N_STEP)]) == expected


def check_interruptions(corpus, expected: list, times: int = 20) -> None:
    """Many times two interruptions at random steps, each part on a random world size."""
    choose = random.Random(1)
    for _ in range(times):
        first, second = sorted(choose.sample(range(1, N_STEP), 2))
        steps = (first, second - first, N_STEP - second)
        worlds = [choose.choice([(1, 4), (2, 8), (4, 1), (8, 2)]) for _ in steps]
        parts = [(*world, n) for world, n in zip(worlds, steps, strict=True)]
        assert global_batches(corpus, parts) == expected


@pytest.mark.slow
def test_interrupted_twice_on_other_world_sizes_the_stream_goes_on(corpus, expected):
    check_interruptions(corpus, expected)


@pytest.mark.slow
def test_interrupted_twice_a_stream_of_real_text_goes_on(tmp_path):
    corpus = make_corpus(
        tmp_path / "corpus", StandardLibrary(), sequence_len=128, n_shard=1, splits=("val",)
    )
    corpus.prepare(processes=1)
    expected = global_batches(corpus, [(1, 16, N_STEP)])
    check_interruptions(corpus, expected, times=4)
    assert global_batches(corpus, [(1, 4, 5), (2, 8, 4), (1, 16, 5)], n_worker=2) == expected


@pytest.mark.slow
@pytest.mark.parametrize("n_worker", [1, 2])
def test_worker_processes_change_nothing(corpus, expected, n_worker):
    parts = [(1, 4, 3), (2, 2, 4), (1, 16, N_STEP - 7)]
    assert global_batches(corpus, parts, n_worker) == expected


def test_a_stream_stopped_inside_an_accumulation_window_repeats_the_window(corpus, expected):
    (rank,) = ranks_of(corpus, 1, 4)
    iterator = iter(rank)
    for _ in range(4 * 3 + 2):
        next(iterator)
    (again,) = ranks_of(corpus, 1, 16)
    again.load_state_dict(json.loads(json.dumps(rank.state_dict())))
    assert next(iter(again)).tolist() == expected[3]


def test_one_lap_gives_every_document_once(corpus):
    """Until a lane starts over, the rows hold its documents and nothing else."""
    tokenizer = read_tokenizer(corpus.tokenizer_directory)
    texts = list(open_stripe(corpus.source, "train"))
    beginnings = {tuple(tokenizer.encode(text).ids[:4]) for text in texts}
    seen = set()
    for batch in global_batches(corpus, [(1, 16, 10)]):
        for row in batch:
            cuts = [i for i, token in enumerate(row) if token == 0]
            for a, b in itertools.pairwise([*cuts, len(row)]):
                if b - a > 4:
                    seen.add(tuple(row[a + 1 : a + 5]))
    assert seen <= beginnings
    assert len(seen) > 0.5 * len(beginnings)


def test_lanes_that_do_not_divide_are_refused_with_advice(corpus):
    with pytest.raises(UserError, match="multiple of the number of devices"):
        StreamingRows(corpus, 1, 1, 5, 8, 0, 0, 3)
    with pytest.raises(UserError, match="nearest n_lane that divides it is 6"):
        StreamingRows(corpus, 12, 1, 5, 9, 0, 0, 1)
    (rank,) = ranks_of(corpus, 1, 16)
    with pytest.raises(UserError, match="n_lane 8 of data, now 16"):
        StreamingRows(corpus, 16, 1, 5, 16, 0, 0, 1).load_state_dict(rank.state_dict())


@pytest.mark.parametrize("n_worker", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_lasting_read_errors_stop_training_with_the_files_name(corpus, n_worker):
    broken = make_corpus(corpus.directory, BreaksAfter(), packing=corpus.packing)
    rows = StreamingRows(broken, 1, 1, 500, 1, n_worker, 0, 1)
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read: no access"):
        list(rows)
