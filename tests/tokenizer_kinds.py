"""Tokenizers of every kind that people bring along, trained on a little text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LINES = [
    f"def read_{i}(self, path):\n    return open(path).read()[{i}:] once upon a time, naïve 你好\n"
    for i in range(60)
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _train(tokenizer: Tokenizer, trainer: type, special: list[str], **options: Any) -> Tokenizer:
    tokenizer.train_from_iterator(
        LINES, trainer(vocab_size=420, special_tokens=special, show_progress=False, **options)
    )
    return tokenizer


def _edited(tokenizer: Tokenizer, edit: Callable[[dict], None]) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    edit(content)
    return Tokenizer.from_str(json.dumps(content))


def byte_level(start: str = "<|endoftext|>", *, prefix: bool = False) -> Tokenizer:
    """GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(tokenizer, trainers.BpeTrainer, [start], initial_alphabet=alphabet)


def byte_level_with_prefix() -> Tokenizer:
    """RoBERTa's, which also puts tokens around every text."""
    tokenizer = byte_level("<s>", prefix=True)
    tokenizer.post_processor = processors.RobertaProcessing(("<s>", 0), ("<s>", 0))
    return tokenizer


def byte_level_split() -> Tokenizer:
    """Llama 3's: split by a pattern, NFC as Qwen has it, BOS by a template."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer, ["<|begin_of_text|>"], initial_alphabet=alphabet)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return tokenizer


def byte_level_limited() -> Tokenizer:
    """Truncates, pads and drops merges by chance."""
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32, pad_token="<|endoftext|>")
    tokenizer.model.dropout = 0.5
    return tokenizer


def byte_level_added() -> Tokenizer:
    """Runs of spaces as tokens of their own, one of which takes the spaces beside it."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["    ", "你", AddedToken("then", lstrip=True, rstrip=True)])
    return tokenizer


def byte_level_undecoded() -> Tokenizer:
    """Without a decoder."""
    tokenizer = byte_level("<bos>")
    return _edited(tokenizer, lambda content: content.update(decoder=None))


def byte_level_holes() -> Tokenizer:
    """Five ids unused."""

    def shift(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {t: i + 5 * (i > 300) for t, i in vocabulary.items()}

    return _edited(byte_level("[BOS]"), shift)


def metaspace(scheme: str = "always", start: str = "<s>") -> Tokenizer:
    """BPE over words, with a token for characters that it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _train(tokenizer, trainers.BpeTrainer, ["<unk>", start])


def metaspace_first() -> Tokenizer:
    """A space in front of a text alone, and a start token that was never declared special."""

    def forget(content: dict) -> None:
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<s>"]

    return _edited(metaspace("first"), forget)


def byte_fallback() -> Tokenizer:
    """Llama 2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    special = ["<unk>", "<s>", "</s>", *BYTES]
    _train(tokenizer, trainers.BpeTrainer, special, limit_alphabet=40)

    def forget(content: dict) -> None:
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in BYTES]
        content["pre_tokenizer"] = None
        content["model"]["byte_fallback"] = True

    return _edited(tokenizer, forget)


def unigram() -> Tokenizer:
    """SentencePiece's Unigram with byte fallback."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    _train(tokenizer, trainers.UnigramTrainer, ["<unk>", "<s>", *BYTES], unk_token="<unk>")
    tokenizer.decoder = decoders.Sequence([
        decoders.ByteFallback(), decoders.Metaspace(),
    ])  # fmt: skip

    def forget(content: dict) -> None:
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in BYTES]
        content["model"]["byte_fallback"] = True

    return _edited(tokenizer, forget)


def characters() -> Tokenizer:
    """A token per character, no decoder."""
    letters = sorted(set("".join(LINES)))
    vocabulary = {token: i for i, token in enumerate(["<s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(["<s>", "<unk>"])
    return tokenizer


def spelled() -> Tokenizer:
    """Has merges that make the start token of its characters."""
    tokenizer = byte_level("<unused>")

    def learn(content: dict) -> None:
        vocabulary, n = content["model"]["vocab"], len(content["model"]["vocab"])
        vocabulary |= {"<s": n, "<s>": n + 1}
        content["model"]["merges"] += [["<", "s"], ["<s", ">"]]

    tokenizer = _edited(tokenizer, learn)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


WHOLE = {
    "byte_level": byte_level, "byte_level_with_prefix": byte_level_with_prefix,
    "byte_level_split": byte_level_split, "byte_level_limited": byte_level_limited,
    "byte_level_added": byte_level_added, "byte_level_undecoded": byte_level_undecoded,
    "byte_level_holes": byte_level_holes, "byte_fallback": byte_fallback, "unigram": unigram,
    "spelled": spelled,
}  # fmt: skip
"""Those that can write every text."""
LIMITED = {
    "metaspace": metaspace, "metaspace_first": metaspace_first,
    "metaspace_never": lambda: metaspace("never"), "characters": characters,
}  # fmt: skip
"""Those that can write the characters of LINES."""


def normalized(normalizer: normalizers.Normalizer) -> Tokenizer:
    """Byte-level, after a normalizer."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizer
    return tokenizer


def word_pieces() -> Tokenizer:
    """BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _train(tokenizer, trainers.WordPieceTrainer, ["[UNK]", "[CLS]", "[SEP]", "<s>"])


def words() -> Tokenizer:
    """Between spaces, which are gone."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _train(tokenizer, trainers.BpeTrainer, ["<unk>", "<s>"])


CHANGING = {
    "lowercase": lambda: normalized(normalizers.Lowercase()),
    "nfkc": lambda: normalized(normalizers.NFKC()),
    "nfd": lambda: normalized(normalizers.NFD()),
    "strip": lambda: normalized(normalizers.Strip()),
    "accents": lambda: normalized(
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "one_space": lambda: normalized(normalizers.Replace(Regex(" {2,}"), " ")),
    "word_pieces": word_pieces,
    "words": words,
}
"""Those that cannot give every text back."""


def bring(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    """The folder that a user brings along; ``settings`` go to tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
