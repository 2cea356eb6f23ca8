"""Byte-level BPE: trained on the corpus, or any fast tokenizer that is brought along."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bov_lightning.errors import UserError
from data_modules.encoding import document_encoder

BOS = "<|bos|>"

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""GPT-4's split into words, with numbers of at most two digits."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: trained on the training documents, or read from ``path``."""

    vocab_size: int = 32768
    """Token ids to train, <|bos|> among them."""

    path: str | None = None
    """A directory with a tokenizer.json to use instead of training one."""

    max_chars: int = 2_000_000_000
    """Characters to train on at most."""

    max_chars_per_document: int = 10_000
    """Characters of each document to train on at most."""

    def __post_init__(self):
        if self.path is None and self.vocab_size < 257:
            raise UserError(
                f"data: tokenizer.vocab_size is {self.vocab_size}: at least 257, bytes and {BOS}"
            )


def train_tokenizer(documents: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A byte-level BPE tokenizer; <|bos|> is id 0.

    Raises:
        UserError: the text is too short for that many token ids.
    """

    def capped() -> Iterator[str]:
        left = config.max_chars
        for document in documents:
            text = document[: min(config.max_chars_per_document, left)]
            left -= len(text)
            if text:
                yield text
            if left <= 0:
                return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(capped(), trainer)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise UserError(
            f"data: the corpus yields only {tokenizer.get_vocab_size()} token ids, not "
            f"{config.vocab_size}: give more text or a smaller tokenizer.vocab_size"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes a directory that ``transformers`` reads as a fast tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def read_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a directory's tokenizer.json."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{directory} holds no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path} cannot be read: {error}") from error


def tokenizer_hash(directory: str | Path) -> str:
    """Identifies a tokenizer by its content, however its file is formatted."""
    content = json.loads(read_tokenizer(directory).to_str())
    canonical = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(canonical).hexdigest()[:16]


def bos_id(tokenizer: Tokenizer) -> int:
    """The id of the token that starts every document."""
    for name in (BOS, "<|begin_of_text|>", "<s>", "<|endoftext|>"):
        if (found := tokenizer.token_to_id(name)) is not None:
            return found
    raise UserError(f"the tokenizer has no token that starts a document, such as {BOS}")


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes of every token id, int32; special tokens count 0.

    A byte-level token has one character per byte; any other is measured as it decodes.
    """
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int32)
    for token, i in tokenizer.get_vocab().items():
        if i not in special:
            text = token if byte_level else tokenizer.decode([i]).encode()
            lengths[i] = len(text)
    return lengths


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """uint16 where the vocabulary allows, else uint32."""
    return np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[str], batch_size: int = 64, parallel: bool = True
) -> Iterator[np.ndarray]:
    """Token ids of each document, <|bos|> first; uint16 where the vocabulary allows.

    On all cores if ``parallel``, else on one.
    """
    dtype, start = token_dtype(tokenizer), bos_id(tokenizer)
    encoder = document_encoder(tokenizer, dtype)
    documents = iter(documents)
    while batch := list(islice(documents, batch_size)):
        for found in encoder.encode(batch, parallel):
            ids = np.empty(len(found) + 1, dtype=dtype)
            ids[0] = start
            ids[1:] = found
            yield ids
