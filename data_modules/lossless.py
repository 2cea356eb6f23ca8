"""What of a tokenizer file is left out for pretraining, and the check that texts stay as they are.

A document is its own characters behind the token that starts it. So whatever a file adds to a text
or takes from it is left out where the vocabulary can do without; what then still changes text is
refused, because bytes could not be counted and texts not be read back.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bov_lightning.errors import UserError
from data_modules.vocabulary import bytes_of, special_ids, token_bytes, unknown_characters

BYTE_NAME = "<0x41>"
"""What byte fallback calls the letter A; no text that spells it out has that letter."""
FIRST_SPACE = "the space in front of a text"

TEXTS = (
    "Once upon a time there was a parser.",
    " one space,  two  and\ttabs\n\n  then new lines\r\n and an end ",
    "UPPER lower 0123456789 3.14 (x) [y] {z} <w> \"a\" 'b' #1 $2 %3 &4 *5 +6 ,7 -8 /9",
    ":; = ?! @ ^_`|~ \\\\",
    "naïve café, Straße, Ångström, İstanbul",
    "cafe\u0301 ﬁ ① ２ ½ ™ \u212b \u00a0 \u200b",
    "你好，世界。 日本語 한국어 हिन्दी עברית ไทย",
    "🙂👩‍👩‍👧 €",
)
"""Texts that every kind of normalizer would change."""


def _parts(component: dict | None, key: str) -> list[dict]:
    """A normalizer, pre-tokenizer or decoder as the list of what it does."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for inner in component[key] for part in _parts(inner, key)]


def _whole(parts: list[dict], key: str) -> dict | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    return {"type": "Sequence", key: parts}


def simplify(content: dict[str, Any]) -> list[str]:
    """Takes out of a tokenizer.json what a document must not undergo; says what that was."""
    left_out = []
    normalizers = _parts(content["normalizer"], "normalizers")
    pre_tokenizers = _parts(content["pre_tokenizer"], "pretokenizers")
    decoders = _parts(content["decoder"], "decoders")
    for kind, name in (("Prepend", FIRST_SPACE), ("NFC", "NFC")):
        if any(part["type"] == kind for part in normalizers):
            left_out.append(name)
            normalizers = [part for part in normalizers if part["type"] != kind]
    for part in (*pre_tokenizers, *decoders):
        if part["type"] == "Metaspace" and part["prepend_scheme"] != "never":
            part["prepend_scheme"] = "never"
            left_out.append(FIRST_SPACE)
    for part in pre_tokenizers:
        if part["type"] == "ByteLevel" and part["add_prefix_space"]:
            part["add_prefix_space"] = False
            left_out.append(FIRST_SPACE)
    decoders = [part for part in decoders if part["type"] != "Strip" or part["stop"]]
    if not decoders:
        decoders = _decoders_for(normalizers, pre_tokenizers)
    content["normalizer"] = _whole(normalizers, "normalizers")
    content["pre_tokenizer"] = _whole(pre_tokenizers, "pretokenizers")
    content["decoder"] = _whole(decoders, "decoders")
    for name in ("truncation", "padding"):
        if content[name] is not None:
            content[name] = None
            left_out.append(name)
    if content["model"].get("dropout"):
        content["model"]["dropout"] = None
        left_out.append("dropout")
    return list(dict.fromkeys(left_out))


def _decoders_for(normalizers: list[dict], pre_tokenizers: list[dict]) -> list[dict]:
    """What a file without a decoder is decoded by: tokens would be joined by spaces otherwise."""
    for part in (*normalizers, *pre_tokenizers):
        if part["type"] == "ByteLevel":
            return [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                     "use_regex": False}]  # fmt: skip
        if part["type"] == "Metaspace":
            return [{**part, "prepend_scheme": "never"}]
    return [{"type": "Fuse"}]


def spelled_out(tokenizer: Tokenizer) -> list[str]:
    """The special tokens, and one for a byte, whose characters in a text are read as such."""
    special, found = special_ids(tokenizer), []
    if (byte := tokenizer.token_to_id(BYTE_NAME)) is not None:
        ids = tokenizer.encode(f"a {BYTE_NAME} b", add_special_tokens=False).ids
        found += [BYTE_NAME] * (byte in ids)
    for i in sorted(special):
        token = tokenizer.id_to_token(i)
        ids = tokenizer.encode(text := f"a {token} b", add_special_tokens=False).ids
        if special.intersection(ids) and unknown_characters(tokenizer, text) <= {token}:
            found.append(token)
    return found


def cut_up(content: dict[str, Any], tokens: list[str]) -> None:
    """Cuts behind the first character wherever a text spells out one of the tokens.

    A Unigram model would read it, or the name of a byte, as the token itself.
    """
    special = [token for token in tokens if len(token) > 1 and token != BYTE_NAME]
    patterns = [f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in special]
    if BYTE_NAME in tokens:
        patterns.append("<(?=0x[0-9A-F]{2}>)")
    if patterns:
        cut = {"type": "Split", "pattern": {"Regex": "|".join(patterns)}, "behavior": "Isolated",
               "invert": False}  # fmt: skip
        parts = [cut, *_parts(content["pre_tokenizer"], "pretokenizers")]
        content["pre_tokenizer"] = _whole(parts, "pretokenizers")


def check(tokenizer: Tokenizer, content: dict[str, Any], origin: str) -> None:
    """Refuses a tokenizer that does not give texts back, or whose bytes do not add up.

    Characters that a small vocabulary lacks are left out of the texts: `unknown_characters`.
    """
    parts = [
        *_parts(content["normalizer"], "normalizers"),
        *_parts(content["pre_tokenizer"], "pretokenizers"), content["model"],
        *_parts(content["decoder"], "decoders"),
    ]  # fmt: skip
    kinds = ", ".join(dict.fromkeys(str(part["type"]) for part in parts))

    def refuse(text: str, what: str) -> None:
        raise UserError(
            f"{origin} cannot be pretrained with: {text!r} {what}, so bytes and texts would be "
            f"wrong (it is made of {kinds}): bring a tokenizer that keeps every text as it is"
        )

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    splitter, pair = tokenizer.pre_tokenizer, "a b"
    if splitter is not None:
        if tokenizer.normalizer is not None:
            pair = tokenizer.normalizer.normalize_str(pair)
        ranges = [span for _, span in splitter.pre_tokenize_str(pair)]
        if sum(end - start for start, end in ranges) < len(pair):
            refuse("a b", "loses its space")
    added = tokenizer.get_added_tokens_decoder().values()
    texts = [*TEXTS, *(f"a {token.content} b" for token in added if not token.special)]
    unknown = unknown_characters(tokenizer, "".join(texts))
    for whole in texts:
        text = "".join(character for character in whole if character not in unknown)
        ids = encode(text)
        if (back := tokenizer.decode(ids, skip_special_tokens=False)) != text:
            refuse(text, f"comes back as {back!r}")
        if (counted := sum(bytes_of(tokenizer, ids))) != len(text.encode()):
            refuse(text, f"has {len(text.encode())} bytes, and its tokens {counted}")
    for token in spelled_out(tokenizer):
        refuse(f"a {token} b", "becomes a special token, although its characters are meant")


class ByteCount:
    """Compares the bytes of documents with those of their tokens, while both pass by.

    A vocabulary without a way to write every character loses some: a model that is measured per
    byte of such text would look better than it is.

    Args:
        tokenizer: what makes the tokens.
    """

    TOLERANCE = 1e-4
    """Of the bytes: what four digits of bits per byte do not show."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self._n_byte = tokenizer, token_bytes(tokenizer)
        self.in_text = self.in_tokens = 0
        self._waiting: deque[str] = deque()
        self._missing: set[str] = set()

    def texts(self, documents: Iterable[str]) -> Iterator[str]:
        """The documents, counted."""
        for document in documents:
            self._waiting.append(document)
            yield document

    def tokens(self, documents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The token ids of the same documents, counted."""
        for ids in documents:
            document = self._waiting.popleft()
            n_text, n_token = len(document.encode()), int(self._n_byte[ids].sum())
            self.in_text += n_text
            self.in_tokens += n_token
            if n_text != n_token and not self._missing:
                self._missing = unknown_characters(self.tokenizer, document)
            yield ids

    def check(self, where: str) -> None:
        """Refuses what would be measured wrongly; ``where`` says which text it is."""
        lost = abs(self.in_text - self.in_tokens)
        if lost > self.TOLERANCE * self.in_text:
            missing = ", ".join(map(repr, sorted(self._missing)[:5]))
            raise UserError(
                f"data: the tokens of {where} hold {self.in_tokens:,} of its {self.in_text:,} "
                f"bytes{f' (it has no token for {missing})' if missing else ''}, so bits per byte "
                "would be wrong: bring a tokenizer that can write every character, such as one "
                "with byte fallback"
            )
