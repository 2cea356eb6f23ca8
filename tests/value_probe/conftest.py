"""Text and a tokenizer that probes of tiny models read."""

import sysconfig
from pathlib import Path

import pytest
from evaluation_material import VOCAB_SIZE
from transformers import PreTrainedTokenizerFast

from data_modules.tokenizer import TokenizerConfig, save_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some files of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "csv", "shlex")
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="session")
def tokenizer_directory(texts, tmp_path_factory) -> Path:
    """A byte-level tokenizer of 300 ids."""
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(texts[:1], TokenizerConfig(VOCAB_SIZE)), directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory) -> PreTrainedTokenizerFast:
    """That tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_directory)
