"""Token ids of text: by `tiktoken` where it gives the ids that `tokenizers` gives, since it takes a
fraction of the time, else by `tokenizers`.

A tokenizer.json merges the pairs of tokens that it lists, in the order of its list. `tiktoken`
merges any two tokens whose bytes are a token, lowest rank first. Both do the same for every
text if its ranks are made of what the listed merges do with each token's own bytes, alone:

- A token that its own bytes do not end in is never the outcome of merges in any text: as long as
  no merge crosses the borders of a stretch, the merges inside it are those that it has alone. So it
  gets no rank.
- For the same reason, where two neighbours are the bytes of any other token, they are the pair
  that its own bytes end in last. So this pair is merged by both, and its place in the list is
  the token's rank.

Whether a token's bytes end in it is asked of `tokenizers`, token by token. What the two libraries'
regular expressions make of a pattern is known of the syntax that `_Pattern` reads, and the classes
of characters that stand in it (\\p{L}, \\s) are compared for every character that occurs in a text.
All of this is compared with `tokenizers` once more, on a text made for it and on the first
documents.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How a ByteLevel pre-tokenizer splits by itself."""

UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
COMPARED_CHARS = 50_000
"""Characters of the first documents that are encoded by both libraries."""

LOGGER = logging.getLogger(__name__)


class UnsuitedError(Exception):
    """`tiktoken` cannot stand in for a tokenizer; says why."""


@dataclass(frozen=True)
class Ranks:
    """A tokenizer in the terms of `tiktoken`."""

    pattern: str
    """Splits text into pieces."""
    ranks: dict[bytes, int]
    """Bytes of every token that text can become, in the order of merging; all single bytes first,
    by their values."""
    ids: np.ndarray
    """Token id of every rank, int64; 0 for bytes that no text has."""


def ranks_of(tokenizer: Tokenizer) -> Ranks:
    """A tokenizer in the terms of `tiktoken`.

    Raises:
        UnsuitedError: it has none.
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    for name in ("normalizer", "truncation", "padding"):
        if content[name] is not None:
            raise UnsuitedError(f"it has a {name}")
    if model.get("type") != "BPE":
        raise UnsuitedError(f"its model is {model.get('type')}, not BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            raise UnsuitedError(f"its model has a {name}")
    pattern = _split_pattern(content["pre_tokenizer"])
    _Pattern(pattern)
    ranks, ids = _ranks(model)
    return Ranks(pattern, ranks, ids)


def _split_pattern(pre_tokenizer: dict | None) -> str:
    """The pattern of a byte-level pre-tokenizer."""
    steps = [pre_tokenizer]
    if pre_tokenizer is not None and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    last = steps[-1] if steps else None
    if last is None or last["type"] != "ByteLevel":
        raise UnsuitedError("its pre-tokenizer is not byte-level")
    if last["add_prefix_space"]:
        raise UnsuitedError("its pre-tokenizer puts a space in front")
    if len(steps) == 1 and last.get("use_regex", True):
        return GPT2_PATTERN
    if len(steps) != 2 or last.get("use_regex", True) or steps[0]["type"] != "Split":
        raise UnsuitedError("its pre-tokenizer does more than one split by a pattern")
    split = steps[0]
    if split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        raise UnsuitedError("its pre-tokenizer does not keep what a pattern matches as pieces")
    return split["pattern"]["Regex"]


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, and the byte."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = [c for c in characters if ord(c) < 256]
    others = [c for c in characters if ord(c) >= 256]
    left = sorted(set(range(256)) - set(map(ord, own)))
    return {c: ord(c) for c in own} | dict(zip(others, left, strict=True))


def _ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], np.ndarray]:
    """Ranks of the tokens that text can become, and their ids."""
    vocabulary: dict[str, int] = model["vocab"]
    alphabet = byte_alphabet()
    lacking = [c for c, byte in alphabet.items() if byte in UTF8_BYTES and c not in vocabulary]
    if lacking:
        raise UnsuitedError(f"its vocabulary lacks {len(lacking)} of the bytes")
    # What no byte has becomes a character that latin-1 has not.
    table = dict.fromkeys(range(256), "\uffff") | {ord(c): chr(b) for c, b in alphabet.items()}

    def bytes_of(token: str) -> bytes | None:
        try:
            return token.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            return None

    merges = [(left, right) for left, right in model["merges"]]
    places: dict[str, list[int]] = {}
    for place, (left, right) in enumerate(merges):
        places.setdefault(left + right, []).append(place)
    # Without a pre-tokenizer, a text is one piece.
    alone = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    order = {pair: place for place, pair in enumerate(merges)}
    tokens = list(places)
    found = []
    for token, encoding in zip(tokens, alone.encode_batch_fast(tokens), strict=True):
        data = bytes_of(token)
        if data is not None and encoding.ids == [vocabulary[token]]:
            own = places[token]
            place = own[0] if len(own) == 1 else order[_last_pair(token, order)]
            found.append((place, data, vocabulary[token]))
    found.sort()
    entries = [(data, token_id) for _, data, token_id in found]
    if model["ignore_merges"]:
        entries += _whole_pieces(vocabulary, {data for data, _ in entries}, alone, bytes_of)
    singles = {byte: vocabulary.get(c, 0) for c, byte in alphabet.items()}
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {data: rank for rank, (data, _) in enumerate(entries, start=256)}
    ids = [singles[byte] for byte in range(256)] + [token_id for _, token_id in entries]
    return ranks, np.array(ids, dtype=np.int64)


def _last_pair(token: str, order: dict[tuple[str, str], int]) -> tuple[str, str]:
    """The pair that a token's characters are before they are one token."""
    parts = list(token)
    while len(parts) > 2:
        pairs = [order.get(pair, len(order)) for pair in pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _whole_pieces(
    vocabulary: dict[str, int], reached: set[bytes], alone: Tokenizer, bytes_of: Callable
) -> list[tuple[bytes, int]]:
    """Tokens that only a whole piece becomes: the vocabulary is asked before merges are."""
    entries = []
    for token, token_id in vocabulary.items():
        data = bytes_of(token)
        if data is None or len(data) < 2 or data in reached:
            continue
        if len(alone.encode(token).ids) == 2:
            # Neighbours that `tiktoken` would merge everywhere.
            raise UnsuitedError(f"its token {token!r} is no merge of the two that it consists of")
        entries.append((data, token_id))
    return entries


class _Pattern:
    """Reads the syntax of regular expressions that Oniguruma (as `tokenizers` uses it) and Rust's
    engines understand alike, and refuses the rest.

    Among the rest are anchors (Oniguruma's ^ matches at every line), possessive repetition after
    braces (not possessive there), lazy repetition and operators in classes.
    """

    PROPERTY = re.compile(r"\\[pP]\{\w+\}|\\[sSdDwW]")
    ESCAPE = re.compile(r"\\[rnt\\/\[\](){}.*+?|^$'\"-]")
    QUANTIFIER = re.compile(r"[?*+]\+?|\{(\d+)(?:,\d*)?\}")
    PLAIN = re.compile(r"[^\\^$.|?*+()\[\]{}]")
    IN_CLASS = re.compile(r"[^\\^\[\]&~-]")
    RANGE = re.compile(r"[A-Za-z]-[A-Za-z]|[0-9]-[0-9]")
    LAST_DASH = re.compile(r"-(?=\])")

    def __init__(self, source: str):
        """
        Raises:
            UnsuitedError: it holds other syntax, or matches the empty text.
        """
        self.source, self.at = source, 0
        self.properties: dict[str, None] = {}
        """Classes of characters that the pattern names."""
        self.folding: list[str] = []
        """Groups that ignore case."""
        width = self._alternatives(folding=False)
        if self.at < len(source):
            raise self._refusal()
        if not width:
            raise UnsuitedError(f"its pattern matches the empty text: {source}")

    def _refusal(self) -> UnsuitedError:
        rest = self.source[self.at : self.at + 10]
        return UnsuitedError(f"the engines may differ in {rest!r} of its pattern")

    def _take(self, expected: "str | re.Pattern") -> "re.Match | bool | None":
        if isinstance(expected, str):
            if not self.source.startswith(expected, self.at):
                return None
            self.at += len(expected)
            return True
        found = expected.match(self.source, self.at)
        if found:
            self.at = found.end()
        return found

    def _alternatives(self, folding: bool) -> int:
        """Characters that the shortest match has."""
        widths = [self._sequence(folding)]
        while self._take("|"):
            widths.append(self._sequence(folding))
        return min(widths)

    def _sequence(self, folding: bool) -> int:
        total = 0
        while self.at < len(self.source) and self.source[self.at] not in "|)":
            width, repeatable = self._atom(folding)
            if repeat := self._take(self.QUANTIFIER):
                least = int(repeat[1]) if repeat[1] else int(repeat[0][0] == "+")
                width *= least
                if not repeatable or self.source[self.at : self.at + 1] in ("?", "*", "+", "{"):
                    raise self._refusal()
            total += width
        return total

    def _atom(self, folding: bool) -> tuple[int, bool]:
        """Least width, and whether it may be repeated."""
        begin = self.at
        if self._take("[") is not None:
            self._class(folding)
            return 1, True
        if self._take("(?!") or self._take("(?="):
            self._alternatives(folding)
            self._close()
            return 0, False
        if self._take("(?i:"):
            width = self._alternatives(folding=True)
            self._close()
            self.folding.append(self.source[begin : self.at])
            return width, True
        if self._take("(?:") or (self._take(re.compile(r"\((?!\?)"))):
            width = self._alternatives(folding)
            self._close()
            return width, True
        if not folding and (found := self._take(self.PROPERTY)):
            self.properties[found[0]] = None
        elif self._take(self.ESCAPE):
            pass
        elif not (found := self._take(self.PLAIN)) or (folding and not found[0].isascii()):
            self.at = begin
            raise self._refusal()
        return 1, True

    def _close(self) -> None:
        if not self._take(")"):
            raise self._refusal()

    def _class(self, folding: bool) -> None:
        if self._take("^") and folding:
            raise self._refusal()
        members = 0
        while not self._take("]"):
            begin = self.at
            if not folding and (found := self._take(self.PROPERTY)):
                self.properties[found[0]] = None
            elif (
                (not folding and self._take(self.RANGE))
                or self._take(self.ESCAPE)
                or self._take(self.LAST_DASH)
            ):
                pass
            elif not (found := self._take(self.IN_CLASS)) or (folding and not found[0].isascii()):
                self.at = begin
                raise self._refusal()
            members += 1
        if not members:
            raise self._refusal()


def _tiktoken(pattern: str, ranks: dict[bytes, int]) -> Any:
    """An encoding of `tiktoken`, made of what is given alone."""
    try:
        # The import takes a while, and not every machine has the library.
        import tiktoken
    except ImportError as error:
        raise UnsuitedError(f"tiktoken is missing: {error}") from error
    # It searches for special tokens, so it is given one; since it is not allowed in any text, one
    # that holds these characters is text nonetheless.
    special = {"\x00<special>\x00": len(ranks)}
    try:
        return tiktoken.Encoding(
            "bov", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
    except ValueError as error:
        raise UnsuitedError(f"tiktoken refuses its pattern: {error}") from error


class _Characters:
    """Which characters the two regular-expression engines hold for the same.

    Their Unicode tables are of different years. Asked of both engines for every character that
    occurs, when it occurs first.
    """

    UNKNOWN, ALIKE, DIFFERENT = 0, 1, 2

    def __init__(self, pattern: _Pattern):
        self._folding = bool(pattern.folding)
        # A letter in front of each tells what has matched.
        atoms = [*pattern.properties, *pattern.folding]
        self._markers = [chr(ord("A") + i) for i in range(len(atoms))]
        if len(atoms) > 26:
            raise UnsuitedError("its pattern is too long to compare")
        source = "|".join(m + atom for m, atom in zip(self._markers, atoms, strict=True)) or "A"
        self._theirs = pre_tokenizers.Split(Regex(source), "removed")
        self._ours = _tiktoken(source, {bytes([byte]): byte for byte in range(256)})
        self._letters = sorted({c for group in pattern.folding for c in group[4:] if c.isalpha()})
        self._state = np.zeros(0x110000, dtype=np.uint8)
        self._state[:128] = self.ALIKE
        self._state[0xD800:0xE000] = self.DIFFERENT
        self._lock = Lock()

    def are_alike(self, text: str) -> bool:
        """Whether all characters of a text are the same to both."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        states = self._state[codes]
        if not states.all():
            with self._lock:
                new = np.unique(codes[states == self.UNKNOWN])
                self._learn([chr(code) for code in new])
            states = self._state[codes]
        return bool(states.max() == self.ALIKE)

    def _learn(self, characters: list[str]) -> None:
        if len(characters) > 1 and self._agree("".join(map(self._probe, characters))):
            self._state[[ord(c) for c in characters]] = self.ALIKE
            return
        for c in characters:
            alike = self._agree(self._probe(c))
            self._state[ord(c)] = self.ALIKE if alike else self.DIFFERENT

    def _probe(self, character: str) -> str:
        """A text that shows what every class of the pattern makes of a character."""
        ends = [character]
        if self._folding and any(c.isascii() for c in character.casefold()):
            # Becomes ordinary letters where case is ignored, perhaps several.
            ends += [a + character + b for a in ["", *self._letters] for b in ["", *self._letters]]
            ends += ["'" + end for end in ends]
        return "".join(marker + end for end in ends for marker in self._markers)

    def _agree(self, text: str) -> bool:
        matched, at = [], 0
        for _, (begin, end) in self._theirs.pre_tokenize_str(text):
            matched.append(text[at:begin])
            at = end
        matched.append(text[at:])
        return "".join(matched).encode() == bytes(self._ours.encode_ordinary(text))


class TextEncoder:
    """Token ids of texts, the same as the slow way gives, whichever way they are made.

    ``reason`` says why it takes the slow way for every text; None where it need not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        slow: Callable[[list[str]], Sequence[Sequence[int]]],
        apart: Sequence[str] = (),
        dtype: Any = np.int32,
        ranks: Ranks | None = None,
    ):
        """
        Args:
            tokenizer: what to encode with.
            slow: ids of every text by way of ``tokenizers``.
            apart: tokens that `slow` finds in text before anything else; a text that holds one is
                encoded the slow way.
            dtype: of the ids.
            ranks: `ranks_of` the tokenizer, where they are known already.
        """
        self._slow, self._dtype = slow, np.dtype(dtype)
        self._apart = re.compile("|".join(map(re.escape, apart))) if apart else None
        self._to_compare = 0
        try:
            ranks = ranks_of(tokenizer) if ranks is None else ranks
            self._encoding = _tiktoken(ranks.pattern, ranks.ranks)
            self._characters = _Characters(_Pattern(ranks.pattern))
        except UnsuitedError as error:
            self.reason: str | None = str(error)
            return
        self.reason = None
        self._ids = ranks.ids.astype(self._dtype)
        self._lengths = np.array([len(data) for data in ranks.ranks], dtype=np.uint16)
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self._compare(trial_texts(added))
        self._to_compare = COMPARED_CHARS

    def encode(self, texts: list[str], parallel: bool = True) -> list[np.ndarray]:
        """Ids of every text.

        Args:
            texts: any texts.
            parallel: on all cores, unless TOKENIZERS_PARALLELISM is false.
        """
        if not texts:
            return []
        if self.reason is not None:
            return self._slowly(texts)
        first = []
        while self._to_compare > 0 and len(first) < len(texts):
            first.append(texts[len(first)])
            self._to_compare -= 1 + len(first[-1])
        if first:
            return [*self._compare(first), *self.encode(texts[len(first) :], parallel)]
        n_thread = min(_n_thread() if parallel else 1, len(texts))
        if n_thread > 1:
            with ThreadPoolExecutor(n_thread) as pool:
                found = list(pool.map(self._quickly, texts))
        else:
            found = list(map(self._quickly, texts))
        left = [i for i, ids in enumerate(found) if ids is None]
        if left:
            for i, ids in zip(left, self._slowly([texts[i] for i in left]), strict=True):
                found[i] = ids
        return found

    def _slowly(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=self._dtype) for ids in self._slow(texts)]

    def _quickly(self, text: str) -> np.ndarray | None:
        """None where only the slow way is known to be right."""
        if text.isascii():
            n_byte = len(text)
        elif self._characters.are_alike(text):
            n_byte = len(text.encode())
        else:
            return None
        if self._apart is not None and self._apart.search(text):
            return None
        try:
            found = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # A run that the engine gives up on.
            return None
        # What the pattern does not match is a piece to `tokenizers`, and nothing to `tiktoken`.
        if self._lengths[found].sum() != n_byte:
            return None
        return self._ids[found]

    def _compare(self, texts: list[str]) -> list[np.ndarray]:
        """Encodes in both ways; where they differ, the slow one is taken from now on."""
        right = self._slowly(texts)
        for text, ids in zip(texts, right, strict=True):
            own = self._quickly(text)
            if own is not None and not np.array_equal(own, ids) and self.reason is None:
                self.reason = f"tiktoken gives other ids, as for {text[:40]!r}"
                LOGGER.warning("text is encoded with tokenizers: %s", self.reason)
        return right


def trial_texts(added: Sequence[str]) -> list[str]:
    """Texts of every sort: each byte, contractions, digits, white space, scripts, long runs, and
    the tokens that a tokenizer adds, spelled out."""
    blanks = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u180e\u200b"
    words = "don't DON'T we'll We'LL they've I'm I'D it's 'S 'sx 'llama o'clock ’s 'ſ 'K x'ré"
    numbers = "1 12 123 1234567890 3.14 1,000 x1y22z333 ٣٤٥ १२३ Ⅷ ½ ² 1e-5"
    signs = 'a+=b; !! ?! ... ---- ==== (x) [y] {z} <|x|> #$%&*@^_`~ \\ / "q" “q” — … € ¿?'
    scripts = (
        "日本語のテキスト、中文字符。 한국어 ไทยไม่มีช่องว่าง العربية עברית हिन्दी Ελληνικά "
        "Кириллица naïve e\u0301a\u0308 \u0301 ǅ ß ﬁ İstanbul 👩‍👩‍👧‍👦 🇩🇪 👍🏽 𝔘𝔫𝔦 𒀀 "
        "\U000e0001 \ufffd \ufeff"
    )
    mixed = [f"{a}{b}x{b}{a}1{a}{a}{b}.{b}\n{a}" for a in blanks for b in " \n\xa0"]
    every = ["".join(map(chr, range(begin, begin + 64))) for begin in range(0, 0x800, 64)]
    every += [chr(code) for code in range(0x800, 0xD800, 997)]
    every += [chr(code) for code in range(0xE000, 0x110000, 9973)]
    runs = [c * n for c in "a1= \n\té語" for n in (2, 3, 7, 99, 100, 101, 1000)]
    texts = [words, numbers, signs, scripts, "".join(mixed), "".join(every), " ".join(every)]
    texts += [f"{run}b {run}" for run in runs] + [f"a {token}b{token}\n" for token in added[:300]]
    return ["", "a", *texts]


def _n_thread() -> int:
    """Cores to encode on; by the switch that `tokenizers` has."""
    switch = os.environ.get("TOKENIZERS_PARALLELISM", "").lower()
    if switch in ("0", "f", "false", "n", "no", "off"):
        return 1
    return os.cpu_count() or 1


_encoders: list[tuple[Tokenizer, str, TextEncoder]] = []
"""The latest encoders of documents, with what they were made for."""


def document_encoder(
    tokenizer: Tokenizer, dtype: np.dtype, ranks: Ranks | None = None
) -> TextEncoder:
    """Encodes documents: a special token that one spells out means its characters.

    The same tokenizer gets the same encoder, as long as nobody changes it.

    Args:
        tokenizer: what to encode with.
        dtype: of the ids.
        ranks: `ranks_of` the tokenizer, where they are known already.
    """
    state = _state(tokenizer, dtype)
    for known, known_state, encoder in _encoders:
        if known is tokenizer and known_state == state:
            return encoder

    def slow(texts: list[str]) -> list[list[int]]:
        tokenizer.encode_special_tokens = True
        return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    added = tokenizer.get_added_tokens_decoder().values()
    apart = [token.content for token in added if not token.special]
    encoder = TextEncoder(tokenizer, slow, apart, dtype, ranks)
    _encoders[:] = [*_encoders[-3:], (tokenizer, state, encoder)]
    return encoder


def _state(tokenizer: Tokenizer, dtype: np.dtype) -> str:
    """What may be changed of a tokenizer, but for its vocabulary and merges."""
    added = {i: (t.content, t.special) for i, t in tokenizer.get_added_tokens_decoder().items()}
    model = tokenizer.model
    options = [getattr(model, name, None) for name in ("dropout", "ignore_merges")]
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.truncation, tokenizer.padding)
    return repr((str(dtype), tokenizer.get_vocab_size(), added, options, *map(str, parts)))
