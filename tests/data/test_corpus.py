"""Prepared corpora: the same files from any number of processes and machines, or a clear error."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from bisect import bisect_left
from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest
from data.conftest import make_corpus, numbered, write_parquet

from bov_lightning.errors import UserError
from data_modules.packing import PackingConfig
from data_modules.reader import open_stripe
from data_modules.sources import TextFiles
from data_modules.tokenizer import (
    TokenizerConfig,
    encode_documents,
    read_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from data_modules.tokenizer import save_tokenizer as save

CONCAT = PackingConfig(kind="concat")


def contents(corpus) -> dict[str, bytes]:
    return {
        str(path.relative_to(corpus.directory)): path.read_bytes()
        for path in sorted(corpus.directory.rglob("*"))
        if path.is_file()
    }


def all_rows(corpus, split="train") -> np.ndarray:
    rows = corpus.open_rows(split, corpus.read_manifest())
    return rows.read(np.arange(len(rows)))


@pytest.fixture
def corpus(synthetic, tmp_path):
    corpus = make_corpus(tmp_path / "corpus", synthetic)
    corpus.prepare(processes=1)
    return corpus


@pytest.mark.slow
def test_processes_and_machines_write_the_same_files(corpus, synthetic, tmp_path):
    expected = contents(corpus)
    assert sum(name.endswith(".bin") for name in expected) == 5
    for processes in (2, 4):
        other = make_corpus(tmp_path / f"by-{processes}", synthetic)
        other.prepare(processes=processes)
        assert contents(other) == expected
    machines = make_corpus(tmp_path / "machines", synthetic)
    for i in (0, 2, 1):
        assert not machines.is_prepared()
        machines.prepare(processes=1, shard=(i, 3))
    assert machines.is_prepared()
    assert contents(machines) == expected


def test_preparing_again_changes_nothing(corpus):
    before = {path: path.stat().st_mtime_ns for path in corpus.directory.rglob("*")}
    corpus.prepare(processes=1)
    assert {path: path.stat().st_mtime_ns for path in corpus.directory.rglob("*")} == before


def check_rows_against_documents(corpus, split: str) -> None:
    """Every piece of a row is a whole document or the beginning of one, each used once, and what
    is missing is what the manifest reports."""
    tokenizer = read_tokenizer(corpus.tokenizer_directory)

    def sortable(ids: np.ndarray) -> bytes:
        return ids.astype(">u2").tobytes()

    documents = encode_documents(tokenizer, open_stripe(corpus.source, split))
    full = sorted(sortable(ids) for ids in documents)
    unused = Counter(full)
    rows, cropped_pieces = all_rows(corpus, split), []
    for row in rows:
        starts = np.flatnonzero(row == 0)
        assert starts[0] == 0
        for a, b in itertools.pairwise([*starts, len(row)]):
            piece = sortable(row[a:b])
            if unused[piece]:
                unused[piece] -= 1
            else:
                cropped_pieces.append(piece)
    for piece in sorted(cropped_pieces, key=len, reverse=True):
        i = bisect_left(full, piece)
        while not unused[full[i]]:
            i += 1
        assert full[i].startswith(piece), "a piece of no document"
        unused[full[i]] -= 1
    shards = corpus.read_manifest()["shards"][split]
    n_token = sum(map(len, full)) // 2
    assert sum(shard["documents"] for shard in shards) == len(full)
    assert sum(shard["tokens"] for shard in shards) == n_token
    assert sum(shard["cropped"] for shard in shards) == n_token - rows.size


def test_rows_hold_every_document_or_its_reported_cropped_part(corpus):
    for split in ("train", "val"):
        check_rows_against_documents(corpus, split)


def test_concat_crops_nothing_but_the_last_row(synthetic, tmp_path):
    corpus = make_corpus(tmp_path / "concat", synthetic, packing=CONCAT, n_shard=1)
    corpus.prepare(processes=1)
    tokenizer = read_tokenizer(corpus.tokenizer_directory)
    texts = open_stripe(corpus.source, "train")
    stream = [i for text in texts for i in [0, *tokenizer.encode(text).ids]]
    rows = all_rows(corpus)
    # Every row starts with the last token of the one before.
    joined = [*rows[0].tolist(), *(token for row in rows[1:] for token in row[1:].tolist())]
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    assert joined == stream[: len(joined)]
    (shard,) = corpus.read_manifest()["shards"]["train"]
    assert shard["cropped"] == len(stream) - len(joined) < 16


@pytest.mark.slow
def test_a_killed_preparation_continues(tmp_path):
    """kill -9 while shards are being packed, then the same call again."""
    source = TextFiles(
        [write_parquet(tmp_path / "train.parquet", numbered(0, 20_000), 500)],
        [write_parquet(tmp_path / "val.parquet", numbered(10**6, 20))],
    )
    whole, killed = (make_corpus(tmp_path / name, source, n_shard=12) for name in ("a", "b"))
    whole.prepare(processes=1)
    process = multiprocessing.get_context("spawn").Process(target=killed.prepare, args=(1,))
    process.start()
    while len(list(killed.directory.glob("train-*.json"))) < 2 and process.is_alive():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = {path: path.stat().st_mtime_ns for path in killed.directory.glob("train-*.json")}
    assert 2 <= len(done) < 12
    killed.prepare(processes=2)
    assert contents(killed) == contents(whole)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in done.items())


def test_damaged_shards_are_noticed_and_packed_again(corpus):
    expected = contents(corpus)
    shard = corpus.directory / "train-00002-of-00004.bin"
    manifest = corpus.read_manifest()
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-00002-of-00004\.bin is missing or truncated"):
        corpus.open_rows("train", manifest)
    corpus.prepare(processes=1)
    assert contents(corpus) == expected
    flipped = bytearray(shard.read_bytes())
    flipped[5] ^= 1
    shard.write_bytes(flipped)
    corpus.prepare(processes=1)
    assert contents(corpus) == expected


def test_token_ids_beyond_the_vocabulary_name_the_shard(corpus):
    rows = corpus.open_rows("train", corpus.read_manifest())
    shard = corpus.directory / "train-00000-of-00004.bin"
    data = np.fromfile(shard, dtype=np.uint16)
    data[20] = 300
    data.tofile(shard)
    with pytest.raises(UserError, match=r"train-00000.*token id 300, beyond the 300"):
        rows.read(np.arange(4))


def test_a_shard_deleted_while_training_names_the_shard(corpus):
    rows = corpus.open_rows("train", corpus.read_manifest())
    rows.read(np.arange(len(rows)))
    (corpus.directory / "train-00003-of-00004.bin").unlink()
    rows.read(np.arange(3))
    with pytest.raises(UserError, match="train-00003.*cannot be read any more"):
        rows.read(np.arange(len(rows)))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"sequence_len": 32}, "sequence_len 16, not 32"),
        ({"packing": CONCAT}, "packing"),
        ({"n_shard": 5}, "n_shard 4, not 5"),
    ],
)
def test_two_settings_do_not_mix_in_one_directory(corpus, synthetic, options, word):
    before = contents(corpus)
    other = make_corpus(corpus.directory, synthetic, **options)
    for call in (other.prepare, other.is_prepared):
        with pytest.raises(UserError, match=word):
            call()
    assert contents(corpus) == before


def test_another_text_or_tokenizer_is_refused(corpus, synthetic, tmp_path):
    longer = TextFiles([*synthetic.files("train"), *synthetic.files("val")], synthetic.files("val"))
    with pytest.raises(UserError, match="fingerprint"):
        make_corpus(corpus.directory, longer).prepare()
    other = train_tokenizer(["some other text " * 50], TokenizerConfig(vocab_size=265))
    save(other, corpus.tokenizer_directory)
    with pytest.raises(UserError, match="is not the tokenizer"):
        corpus.read_manifest()


def test_prepared_rows_serve_without_their_text(tmp_path, capsys):
    paths = [write_parquet(tmp_path / f"{n}.parquet", numbered(i, 60)) for i, n in enumerate("ab")]
    corpus = make_corpus(tmp_path / "corpus", TextFiles(paths[:1], paths[1:]))
    corpus.prepare(processes=1)
    rows = all_rows(corpus)
    (tmp_path / "a.parquet").unlink()
    capsys.readouterr()
    assert corpus.is_prepared()
    assert "as it is" in capsys.readouterr().err
    assert (all_rows(corpus) == rows).all()
    with pytest.raises(UserError, match="sequence_len"):
        make_corpus(corpus.directory, corpus.source, sequence_len=8).is_prepared()


def test_a_brought_tokenizer_is_used(corpus, synthetic, tmp_path):
    own = make_corpus(tmp_path / "own", synthetic)
    own.tokenizer = TokenizerConfig(path=str(corpus.tokenizer_directory))
    own.prepare(processes=1)
    assert tokenizer_hash(own.tokenizer_directory) == tokenizer_hash(corpus.tokenizer_directory)
    assert (all_rows(own) == all_rows(corpus)).all()


def test_unreadable_rows_are_an_error_or_counted_in_the_manifest(tmp_path):
    lines = [json.dumps({"text": text}) for text in numbered(0, 100)]
    lines[40] = "no json"
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, json.dumps({"text": ""})]))
    source = TextFiles([str(tmp_path / "x.jsonl")], [write_parquet(tmp_path / "v", numbered(0, 9))])
    source.patterns["val"] = [write_parquet(tmp_path / "v.parquet", numbered(0, 9))]
    with pytest.raises(UserError, match=r"x\.jsonl row 41: no JSON object"):
        make_corpus(tmp_path / "strict", source).prepare(processes=1)
    followed = make_corpus(tmp_path / "strict", source, on_error="skip")
    followed.prepare(processes=1)
    lenient = make_corpus(tmp_path / "lenient", source, on_error="skip")
    lenient.prepare(processes=1)
    shards = lenient.read_manifest()["shards"]["train"]
    assert sum(shard["skipped"] for shard in shards) == 1
    assert sum(shard["empty"] for shard in shards) == 1
    assert sum(shard["documents"] for shard in shards) == 99
    assert followed.read_manifest()["shards"] == lenient.read_manifest()["shards"]


@pytest.mark.slow
def test_several_that_prepare_one_directory_all_end_well(tmp_path):
    """Two fits at once, say, and a machine with its part; then one that is killed meanwhile."""
    paths = [write_parquet(tmp_path / f"{n}.parquet", numbered(i, 300)) for i, n in enumerate("ab")]
    source = TextFiles(paths[:1], paths[1:])
    whole, shared = (make_corpus(tmp_path / name, source, n_shard=6) for name in ("a", "b"))
    whole.prepare(processes=1)
    spawn = multiprocessing.get_context("spawn")

    def start(*arguments) -> multiprocessing.Process:
        process = spawn.Process(target=shared.prepare, args=arguments)
        process.start()
        return process

    for process in [start(1), start(1), start(2), start(1, (1, 2)), start(1, (0, 2))]:
        process.join(120)
        assert process.exitcode == 0
    assert contents(shared) == contents(whole)

    shutil.rmtree(shared.directory)
    first, second = start(1), start(1)
    while not list(shared.directory.glob(".part-0-of-1.*")):
        time.sleep(0.001)
    (claim,) = shared.directory.glob(".part-0-of-1.*")
    owner = json.loads(claim.read_text())["pid"]
    os.kill(owner, signal.SIGKILL)
    for process in (first, second):
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if process.pid == owner else 0)
    assert contents(shared) == contents(whole)


@pytest.mark.slow
def test_errors_in_worker_processes_arrive(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a b c"}) + "\n" + "no json\n" * 3)
    val = write_parquet(tmp_path / "v.parquet", numbered(0, 9))
    source = TextFiles([str(tmp_path / "x.jsonl")], [val])
    tokenizer = train_tokenizer(numbered(0, 50), TokenizerConfig(vocab_size=270))
    save(tokenizer, tmp_path / "tokenizer")
    corpus = make_corpus(tmp_path / "corpus", source)
    corpus.tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match="no JSON object"):
        corpus.prepare(processes=2)
    assert not corpus.is_prepared()


@pytest.mark.slow
def test_real_text_is_prepared_alike_by_processes_and_machines(shared, tmp_path):
    """Every fifteenth document of the 75 MB corpus, by 1 and by 3 processes, and by two machines.

    The files have several row groups, so that processes share them."""
    folder, files = shared / "corpus", {"train": [], "val": []}
    for split, paths in files.items():
        for path in sorted(folder.glob(f"{split}-*.parquet"))[:3]:
            texts = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()[::15]
            paths.append(write_parquet(tmp_path / path.name, texts, 100))
    source = TextFiles(**files)
    corpora = {
        name: make_corpus(
            tmp_path / name, source, packing=PackingConfig(), sequence_len=2048, n_shard=3
        )
        for name in ("one", "three", "machines")
    }
    for corpus in corpora.values():
        corpus.tokenizer = TokenizerConfig(vocab_size=1024, max_chars=10**6)
    corpora["one"].prepare(processes=1)
    corpora["three"].prepare(processes=3)
    for i in (0, 1):
        corpora["machines"].prepare(processes=1, shard=(i, 2))
    expected = contents(corpora["one"])
    assert contents(corpora["three"]) == contents(corpora["machines"]) == expected
    for split in ("train", "val"):
        check_rows_against_documents(corpora["one"], split)


@pytest.mark.slow
def test_real_validation_text_is_none_of_the_training_text(shared):
    """All of the 75 MB corpus."""
    folder = shared / "corpus"
    source = TextFiles([str(folder / "train-*.parquet")], [str(folder / "val-*.parquet")])
    train, val = (set(open_stripe(source, split)) for split in ("train", "val"))
    assert train
    assert val
    assert not train & val
