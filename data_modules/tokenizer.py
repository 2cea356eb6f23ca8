"""Byte-level BPE: trained on the corpus, or any fast tokenizer that is brought along.

A tokenizer file carries behaviour besides its vocabulary. What of it counts for pretraining is
decided in one place, `decide`; what is saved then says just that, and every command reads it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bov_lightning.errors import UserError
from bov_lightning.kinds import COUNT, PATH, Range
from data_modules.encoding import document_encoder
from data_modules.lossless import check, cut_up, simplify, spelled_out
from data_modules.vocabulary import (
    token_bytes,  # noqa: F401 (whoever reads a tokenizer finds it here)
    vocabulary_size,
)

BOS = "<|bos|>"
STARTS = (BOS, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|endoftext|>")
"""Tokens that start documents where nobody names one; the first that a tokenizer has."""
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
DECIDED = (*ROLES, "tokenizer_class", "auto_map", "clean_up_tokenization_spaces", "add_bos_token",
           "add_eos_token", "add_prefix_space", "added_tokens_decoder")  # fmt: skip
"""Keys of tokenizer_config.json that say how a text becomes tokens: ours say it."""
FILE = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that name special tokens; the first that names one counts."""

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""GPT-4's split into words, with numbers of at most two digits."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: trained on the training documents, or read from ``path``."""

    vocab_size: Annotated[int, Range(1, 2**31)] = 32768
    """Token ids to train, <|bos|> among them."""

    path: Annotated[str | None, PATH] = None
    """A directory with a tokenizer.json to use instead of training one."""

    start: str | None = None
    """The token of `path` that starts every document. null: the bos_token that the directory
    names, else the first that it has of `<|bos|>`, `<|begin_of_text|>`, `<s>`, `<bos>`, `[BOS]` and
    `<|endoftext|>`."""

    max_chars: Annotated[int, COUNT] = 2_000_000_000
    """Characters to train on at most."""

    max_chars_per_document: Annotated[int, COUNT] = 10_000
    """Characters of each document to train on at most."""

    def __post_init__(self):
        if self.path is None and self.start is not None:
            raise UserError(
                f"data: tokenizer.start {self.start!r} names a token of tokenizer.path, which is "
                f"missing: a tokenizer that is trained here starts documents with {BOS}"
            )
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


@dataclass(frozen=True)
class Decision:
    """What a tokenizer file means for pretraining; every command uses this."""

    content: str
    """The tokenizer.json that documents are tokenized with: no text is changed, nothing added. Its
    template for pairs begins with the start token, so that it knows it: `bos_id`."""
    names: dict[str, str]
    """The special tokens by role (``bos_token``: what starts a document), as ``transformers`` names
    them; the file has every one of them."""
    left_out: tuple[str, ...]
    """What else the file does to a text."""

    @property
    def start(self) -> str:
        """The token that starts every document."""
        return self.names["bos_token"]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, for which all characters of a document are text."""
        return _for_documents(self.content)


def decide(directory: str | Path, start: str | None = None) -> Decision:
    """Reads what a directory's tokenizer.json means for pretraining.

    Args:
        directory: it, and tokenizer_config.json or special_tokens_map.json where they name tokens.
        start: the token that starts a document, if not the one that the files name.

    Raises:
        UserError: no readable file, no token that starts a document, or one that does not keep a
            text as it is.
    """
    files = [path for name in (FILE, *SETTINGS) if (path := Path(directory) / name).is_file()]
    states = [path.stat() for path in files]
    versions = tuple((s.st_dev, s.st_ino, s.st_mtime_ns, s.st_size) for s in states)
    return _decide(Path(directory), start, versions)


@lru_cache(maxsize=4)
def _decide(directory: Path, start: str | None, versions: tuple) -> Decision:
    """Remembered for as long as the files stay what they are: each lane of a stream asks."""
    raw = _from_file(directory)
    names = {role: token for role, token in _named(directory).items() if _has(raw, token)}
    names["bos_token"] = _start_of(raw, directory, start)
    content = json.loads(raw.to_str())
    left_out = simplify(content)
    content["post_processor"] = _template(names["bos_token"], raw, before=("pair",))
    _make_special(content, raw, names)
    tokenizer = _for_documents(text := json.dumps(content))
    if tokens := spelled_out(tokenizer):
        cut_up(content, tokens)
        tokenizer = _for_documents(text := json.dumps(content))
    check(tokenizer, content, str(directory / FILE))
    return Decision(text, names, tuple(left_out))


def _for_documents(content: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(content)
    # A document that spells out a special token means its characters.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _from_file(directory: str | Path) -> Tokenizer:
    path = Path(directory) / FILE
    if not path.is_file():
        raise UserError(f"{directory} holds no {FILE}: give the folder of a fast tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path} cannot be read: {error}") from error


def _has(tokenizer: Tokenizer, token: str) -> bool:
    return tokenizer.token_to_id(token) is not None


def _read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a settings file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return content


def own_settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, without what `write_tokenizer` decides."""
    content = _read_settings(directory / SETTINGS[0])
    return {key: value for key, value in content.items() if key not in DECIDED}


def _named(directory: Path) -> dict[str, str]:
    """The special tokens that a directory's settings name, by role."""
    names: dict[str, str] = {}
    for content in (_read_settings(directory / file) for file in SETTINGS):
        for role in ROLES:
            token = content.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                names.setdefault(role, token)
    return names


def _known_start(tokenizer: Tokenizer) -> str | None:
    """The token that starts documents where nobody names one."""
    return next((name for name in STARTS if _has(tokenizer, name)), None)


def _start_of(tokenizer: Tokenizer, directory: Path, start: str | None) -> str:
    key = "data.init_args.tokenizer.start"
    if start is not None:
        if not _has(tokenizer, start):
            raise UserError(f"{key} is {start!r}, a token that {directory / FILE} does not have")
        return start
    named = _named(directory).get("bos_token")
    if named is not None and _has(tokenizer, named):
        return named
    # Old versions of this package named <|bos|> whatever the file had.
    if named not in (None, BOS):
        raise UserError(
            f"{directory} names {named!r} as its bos_token, which its {FILE} does not have: name "
            f"the token that starts a document in {key}"
        )
    if found := _known_start(tokenizer):
        return found
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    raise UserError(
        f"the tokenizer in {directory} names no token that starts a document: name one of its own "
        f"in {key} (it has {', '.join(special[:8]) or 'no special tokens'})"
    )


def _template(start: str, tokenizer: Tokenizer, before: tuple[str, ...]) -> dict[str, Any]:
    """A post-processor that puts the start token ``before`` texts that are encoded ``single`` or as
    a ``pair``, in the form that a tokenizer.json has.
    """
    first = {"SpecialToken": {"id": start, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    sequences = {"single": [text], "pair": [text, second]}
    for kind in before:
        sequences[kind].insert(0, first)
    facts = {"id": start, "ids": [tokenizer.token_to_id(start)], "tokens": [start]}
    return {"type": "TemplateProcessing", **sequences, "special_tokens": {start: facts}}


def _make_special(content: dict[str, Any], tokenizer: Tokenizer, names: dict[str, str]) -> None:
    """Declares the named tokens, and that of unknown characters, as tokens that are no text."""
    model, special = content["model"], set(names.values())
    if model.get("unk_token"):
        special.add(model["unk_token"])
    if model.get("unk_id") is not None:
        special.add(model["vocab"][model["unk_id"]][0])
    added = {token["content"]: token for token in content["added_tokens"]}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for name in special:
        token = added.setdefault(name, {"id": tokenizer.token_to_id(name), "content": name})
        token |= {**plain, "special": True}
    for token in added.values():
        # Spaces beside a token that is text are text, too.
        token |= {"lstrip": False, "rstrip": False}
    content["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


def read_tokenizer(directory: str | Path, start: str | None = None) -> Tokenizer:
    """The tokenizer of a directory, as it is used for pretraining; see `decide`."""
    return decide(directory, start).tokenizer()


def save_tokenizer(
    tokenizer: Tokenizer, directory: Path, names: dict[str, str] | None = None
) -> None:
    """Writes a directory that ``transformers`` reads as a fast tokenizer.

    Args:
        tokenizer: trained, or what `decide` made of a file. It is written without a template:
            the start token is put in front of documents, not of every text.
        directory: made if missing.
        names: `Decision.names`; if not given, the start token alone.
    """
    names = names or {"bos_token": tokenizer.id_to_token(bos_id(tokenizer))}
    write_tokenizer(without_template(tokenizer), names, directory)


def stored_tokenizer(directory: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a run, a checkpoint or an export, with which it was trained, and the special
    tokens by role that it has; it may lack a ``bos_token``.
    """
    tokenizer = _from_file(directory)
    names = {role: token for role, token in _named(directory).items() if _has(tokenizer, token)}
    start = names.get("bos_token") or _known_start(tokenizer)
    return tokenizer, {"bos_token": start, **names} if start else names


def transformers_tokenizer(directory: Path) -> Any:
    """`stored_tokenizer` as a ``transformers`` fast tokenizer, which adds no token to it."""
    from transformers import PreTrainedTokenizerFast

    names = stored_tokenizer(directory)[1]
    roles = {role: names.get(role) for role in {*names, *_named(directory)}}
    return PreTrainedTokenizerFast.from_pretrained(directory, **roles)


def write_tokenizer(
    tokenizer: Tokenizer, names: dict[str, str], directory: Path,
    settings: dict[str, Any] | None = None, *, starts_texts: bool = False,
) -> None:  # fmt: skip
    """Writes tokenizer.json and tokenizer_config.json, which say the same.

    Args:
        tokenizer: its template, truncation and the like are written as they are, unless:
        names: the special tokens by role; the tokenizer has every one of them.
        directory: made if missing.
        settings: more for tokenizer_config.json: `own_settings` of where the tokenizer lies.
        starts_texts: whether to put the start token in front of every text from now on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if starts_texts and "bos_token" in names:
        content = json.loads(tokenizer.to_str())
        both = ("single", "pair")
        content["post_processor"] = _template(names["bos_token"], tokenizer, before=both)
        tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.save(str(directory / FILE))
    written = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
        **(settings or {}),
    }
    (directory / SETTINGS[0]).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def without_template(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that puts nothing around a text."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = None
    return copy


def same_tokenizer(one: str | Path, other: str | Path) -> bool:
    """Whether two directories' tokenizers mean the same for pretraining."""
    return decide(one).content == decide(other).content


def identity(config: TokenizerConfig) -> dict[str, Any]:
    """What of the settings decides the token ids of a text."""
    if config.path is None:
        return {key: value for key, value in asdict(config).items() if key != "start"}
    found: dict[str, Any] = {"hash": tokenizer_hash(config.path)}
    start = decide(config.path, config.start).start
    # Only where it is not the one that follows from the file: corpora of before say nothing of it.
    return found if start == _known_start(_from_file(config.path)) else found | {"start": start}


def tokenizer_hash(directory: str | Path) -> str:
    """Identifies a tokenizer by its content, however its file is formatted."""
    content = json.loads(_from_file(directory).to_str())
    canonical = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(canonical).hexdigest()[:16]


def bos_id(tokenizer: Tokenizer) -> int:
    """The id of the token that starts every document: as `decide` has noted it, or that of the
    usual name in a tokenizer which it did not read.
    """
    ids = tokenizer.encode("", "").ids
    if len(ids) == 1:
        return ids[0]
    if (name := _known_start(tokenizer)) is not None:
        return tokenizer.token_to_id(name)
    raise UserError(f"the tokenizer has no token that starts a document, such as {BOS}")


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """uint16 where the vocabulary allows, else uint32."""
    return np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)


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
