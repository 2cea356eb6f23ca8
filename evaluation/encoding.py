"""From prompts to token ids, and to the tokens that count.

Few-shot examples recur in many prompts, so each is tokenised once and prompts are put together from
the pieces, wherever the tokenizer cuts at the seams anyway.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bov_lightning.errors import UserError
from data_modules.encoding import TextEncoder
from data_modules.vocabulary import Following

SEAM = 12
"""Characters on either side of a seam that are tokenised together to see whether it is one."""
WORTH_CHARS = 500_000
"""Characters that are tokenised before a faster way is prepared, which takes a while itself."""
EMPTY = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Prompts:
    """All prompts of one row, in parts."""

    kind: str
    """multiple_choice, schema or language_modeling."""
    blocks: tuple[str, ...]
    """The few-shot examples, which all prompts of the row begin with."""
    items: tuple[str, ...]
    """What follows them: one text per choice; with language_modeling the item without its
    continuation, then the item with it."""


@dataclass
class Row:
    """A token sequence and the part of it that is scored."""

    ids: np.ndarray
    """int32, BOS first."""
    start: int
    """Index of the first scored token, at least 1; all from there on are scored."""


@dataclass
class Counts:
    """What the report must not be silent about."""

    cropped: dict[str, int] = field(default_factory=dict)
    """Prompts longer than the context, by task: their first tokens were left out."""
    unscored: dict[str, int] = field(default_factory=dict)
    """Rows that a time limit left out, by task."""
    limited: dict[str, int] = field(default_factory=dict)
    """Answers that the end of the context cut off, by task."""

    def add_cropped(self, task: str) -> None:
        """Counts one prompt."""
        self.cropped[task] = self.cropped.get(task, 0) + 1

    def add_limited(self, task: str) -> None:
        """Counts one answer."""
        self.limited[task] = self.limited.get(task, 0) + 1


def document_start(tokenizer: Any) -> int:
    """The id in front of every prompt: BOS, or EOS where a tokenizer has no BOS.

    Raises:
        UserError: it has neither.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UserError(
        "the tokenizer has neither a BOS nor an EOS token, which every prompt starts with: set "
        "bos_token in its tokenizer_config.json"
    )


def _ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def text_encoder(tokenizer: Any) -> TextEncoder | None:
    """What gives the same ids as a ``transformers`` tokenizer without special tokens, in less time.

    None where the tokenizer is more than a tokenizer.json.
    """
    # Here since it costs seconds, and a tokenizer of its kind has imported it.
    from transformers import PreTrainedTokenizerFast as Plain

    own = type(tokenizer)
    if not issubclass(own, Plain):
        return None
    for name in ("__call__", "_encode_plus", "_convert_encoding"):
        if getattr(own, name, None) is not getattr(Plain, name, None):
            return None
    backend = tokenizer.backend_tokenizer
    # Spelled out, they are the tokens themselves here.
    apart = [token.content for token in backend.get_added_tokens_decoder().values()]
    return TextEncoder(backend, partial(_ids_of, tokenizer), apart)


class Encoder:
    """Tokenises pieces of text once each.

    Args:
        tokenizer: a ``transformers`` tokenizer.
        limit: pieces that are remembered.
    """

    def __init__(self, tokenizer: Any, limit: int = 200_000):
        self.tokenizer, self.limit = tokenizer, limit
        self.bos = np.array([document_start(tokenizer)], dtype=np.int32)
        self._text = Following(tokenizer)
        self._pieces: dict[str, np.ndarray] = {}
        self._seams: dict[tuple[str, str], bool] = {}
        self._n_char = 0
        self._fast: TextEncoder | None = None

    def encode_many(self, texts: Iterable[str]) -> None:
        """Tokenises what is new among the texts, in one call."""
        if len(self._pieces) > self.limit:
            self._pieces.clear()
        new = [text for text in dict.fromkeys(texts) if text and text not in self._pieces]
        if new:
            for text, ids in zip(new, self._tokenise(new), strict=True):
                self._pieces[text] = np.array(ids, dtype=np.int32)

    def _tokenise(self, texts: list[str]) -> Iterable[Any]:
        if self._n_char < WORTH_CHARS:
            self._n_char += sum(map(len, texts))
            if self._n_char >= WORTH_CHARS:
                self._fast = text_encoder(self.tokenizer)
        return _ids_of(self.tokenizer, texts) if self._fast is None else self._fast.encode(texts)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text alone, without special tokens."""
        if not text:
            return EMPTY
        if text not in self._pieces:
            self.encode_many([text])
        return self._pieces[text]

    def is_seam(self, left: str, right: str) -> bool:
        """Whether tokens never cross from the end of ``left`` to the start of ``right``."""
        key = (left[-SEAM:], right[:SEAM])
        if key not in self._seams:
            parts = [*self.encode(key[0]), *self.encode(key[1])]
            self._seams[key] = parts == self.encode(key[0] + key[1]).tolist()
        return self._seams[key]

    def warm(self, prompts: Iterable[Prompts]) -> None:
        """Tokenises all pieces of many prompts in one call, and what decides their seams."""
        pieces: dict[str, None] = {}
        for prompt in prompts:
            pieces.update(dict.fromkeys(prompt.blocks))
            pieces.update(dict.fromkeys(prompt.items))
            for left, right in self._joints(prompt):
                left, right = left[-SEAM:], right[:SEAM]
                pieces.update(dict.fromkeys((left, right, left + right)))
        self.encode_many(pieces)

    @staticmethod
    def _joints(prompts: Prompts) -> Iterable[tuple[str, str]]:
        yield from zip(prompts.blocks, prompts.blocks[1:], strict=False)
        if prompts.blocks:
            yield from ((prompts.blocks[-1], item) for item in prompts.items)

    def prompt_ids(self, prompts: Prompts) -> list[np.ndarray]:
        """Token ids of every prompt, BOS first, as if each were tokenised whole."""
        head = "".join(prompts.blocks)
        items = list(prompts.items)
        if prompts.kind == "language_modeling":
            # The prompt without its continuation is stripped as a whole.
            without = (head + items[0]).strip()
            if without != head + items[0]:
                return [self._whole(without), self._whole(head + items[1])]
        if not all(self.is_seam(left, right) for left, right in self._joints(prompts)):
            return [self._whole(head + item) for item in items]
        shared = [self.bos, *(self.encode(block) for block in prompts.blocks)]
        return [np.concatenate([*shared, self.encode(item)]) for item in items]

    def _whole(self, text: str) -> np.ndarray:
        return np.concatenate([self.bos, self.encode(text)])

    def rows(self, prompts: Prompts) -> list[Row]:
        """The rows to score: one per choice, or one with language_modeling."""
        ids = self.prompt_ids(prompts)
        if prompts.kind == "language_modeling":
            return [Row(ids[1], _common_start(ids))]
        if prompts.kind == "schema":
            scored = max(1, _common_start([i[::-1] for i in ids]))
            return [Row(i, max(1, len(i) - scored)) for i in ids]
        # A choice that others begin with, or equal, still has its last token scored.
        start = max(1, min(_common_start(ids), *(len(i) - 1 for i in ids)))
        return [Row(i, start) for i in ids]

    def pair(self, context: str, continuation: str) -> Row:
        """The row of a plain lm-eval request; spaces at the context's end belong to what follows.

        As lm-eval's own models cut it, with BOS in front. Where the continuation has merged with
        the context's last token, all from the first token that differs is scored, and at least the
        last. A continuation that adds nothing to the tokens gives an empty row.
        """
        n_space = len(context) - len(context.rstrip())
        if n_space:
            context, continuation = context[:-n_space], context[-n_space:] + continuation
        before, whole = self._whole(context), self._whole(context + continuation)
        if np.array_equal(before, whole):
            return Row(whole, len(whole))
        return Row(whole, max(1, min(_common_start([before, whole]), len(whole) - 1)))

    def n_byte(self, row: Row) -> int:
        """UTF-8 bytes of the text that the scored tokens decode to where they stand."""
        begins_text = row.start == 1 and row.ids[0] == self.bos[0]
        decode = self._text.decode if begins_text else self._text
        return len(decode(row.ids[row.start :].tolist()).encode("utf-8"))


def _common_start(sequences: list[np.ndarray]) -> int:
    """How many ids all sequences begin with."""
    n = min(len(s) for s in sequences)
    same = np.ones(n, dtype=bool)
    for other in sequences[1:]:
        same &= sequences[0][:n] == other[:n]
    return n if same.all() else int(same.argmin())


def crop(row: Row, max_length: int) -> Row:
    """The last ``max_length`` tokens; a scored token without any context is not scored."""
    excess = len(row.ids) - max_length
    if excess <= 0:
        return row
    return Row(row.ids[excess:], max(1, row.start - excess))
