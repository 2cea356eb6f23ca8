"""Corpora for the tests of data, synthetic ones whose documents can be told apart."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_modules.corpus import Corpus
from data_modules.packing import PackingConfig
from data_modules.sources import TextFiles
from data_modules.tokenizer import TokenizerConfig


def write_parquet(path: Path, texts: list[str], row_group: int = 7) -> str:
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group)
    return str(path)


def numbered(first: int, n: int) -> list[str]:
    """Documents of different lengths, each with its own number in every word."""
    return [" ".join([f"w{i}x"] * (1 + i * 7 % 13)) for i in range(first, first + n)]


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory) -> TextFiles:
    """150 training documents in two files of several row groups, 20 of validation."""
    folder = tmp_path_factory.mktemp("synthetic")
    train = [write_parquet(folder / f"{i}.parquet", numbered(75 * i, 75)) for i in range(2)]
    return TextFiles(train, [write_parquet(folder / "val.parquet", numbered(1000, 20))])


def make_corpus(directory: Path, source, **options) -> Corpus:
    options = {"packing": PackingConfig(buffer=8), "sequence_len": 16, "n_shard": 4} | options
    return Corpus(directory, source, TokenizerConfig(vocab_size=300), **options)
