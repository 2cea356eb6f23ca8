"""What token ids stand for: how many there are, how many bytes of text each holds, which text."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token that is one byte of a character without a token of its own (byte fallback)."""
BYTE_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
"""The characters that a byte-level vocabulary writes bytes with."""
REPLACEMENT = "\ufffd"
"""What bytes that are no whole character decode to."""


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The highest token id + 1: ids may have holes."""
    return _size(tokenizer, tokenizer.get_vocab_size())


@lru_cache(maxsize=8)
def _size(tokenizer: Tokenizer, n_token: int) -> int:
    """Remembered, since packing asks again and again; added tokens change ``n_token``."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """The ids that stand for no text."""
    return {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes of text in every token id, int32; special tokens and unused ids count 0.

    Of a tokenizer that `read_tokenizer` gave, the bytes of a text's ids add up to the text's.
    """
    lengths = np.zeros(vocabulary_size(tokenizer), dtype=np.int32)
    ids = list(tokenizer.get_vocab().values())
    lengths[ids] = bytes_of(tokenizer, ids)
    return lengths


def bytes_of(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """UTF-8 bytes of text in each of the ids; see `token_bytes`."""
    added = tokenizer.get_added_tokens_decoder()
    # Decoders may treat the first token as the start of a text, so something stands before each.
    before = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
    n_before = len(tokenizer.decode(before, skip_special_tokens=False))
    texts = tokenizer.decode_batch([[*before, i] for i in ids], skip_special_tokens=False)
    lengths = []
    for i, text in zip(ids, texts, strict=True):
        if i in added:
            lengths.append(0 if added[i].special else len(added[i].content.encode()))
        else:
            lengths.append(_n_byte(tokenizer.id_to_token(i), text[n_before:]))
    return lengths


def _n_byte(token: str, text: str) -> int:
    """Bytes of a token that decodes to ``text``, which says nothing of parts of characters."""
    if REPLACEMENT in text:
        if BYTE.fullmatch(token):
            return 1
        if BYTE_ALPHABET.issuperset(token):
            return len(token)
    return len(text.encode())


def unknown_characters(tokenizer: Tokenizer, text: str) -> set[str]:
    """The characters that the vocabulary cannot write: they vanish, or become a special token."""
    special = special_ids(tokenizer)

    def is_written(character: str, beside: str) -> bool:
        ids = tokenizer.encode(f"{beside}{character}{beside}", add_special_tokens=False).ids
        back = tokenizer.decode(ids, skip_special_tokens=False)
        broken = REPLACEMENT in back and character != REPLACEMENT
        return not special.intersection(ids) and not broken and back != 2 * beside

    # Beside others as well: what strips texts takes a space that stands alone.
    return {c for c in set(text) if not is_written(c, "") and not is_written(c, "a")}


class Following:
    """The text that token ids decode to where other text stands before them.

    Decoders of the SentencePiece kind take the space of a text's first token away, which ids from
    the middle of a text have a right to.

    Args:
        tokenizer: a ``transformers`` tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.before: list[int] = list(tokenizer.encode("a", add_special_tokens=False))[-1:]
        self._start = self.decode(self.before)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids that begin a text, with the names of special tokens."""
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def __call__(self, ids: Iterable[int]) -> str:
        """The text of ids that follow others."""
        whole = self.decode([*self.before, *ids])
        return whole[len(self._start) :] if whole.startswith(self._start) else self.decode(ids)
