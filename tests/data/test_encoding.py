"""Whichever library encodes a text, its ids are those that `tokenizers` gives."""

import json
import logging
import random
import socket
import sys

import numpy as np
import pytest
import tiktoken
from data.conftest import make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
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
from transformers import PreTrainedTokenizerFast

import evaluation.encoding
from data_modules import encoding
from data_modules.encoding import (
    GPT2_PATTERN,
    Ranks,
    TextEncoder,
    UnsuitedError,
    document_encoder,
    ranks_of,
)
from data_modules.tokenizer import SPLIT_PATTERN

pytestmark = pytest.mark.slow

CORPUS = [
    "def read(self, path):\n    return don't_we(1234567, 'x' * 20)\n",
    "It's a naïve café — she'll say they've been I'm WE'RE 日本語のテキスト 12 345\r\n\r\n",
    "  spaces\tand tabs \n\n   aaaaaaaa bbbb ab abab ==== ---- <|bos|> 👩‍👩‍👧 e\u0301e\u0301\n",
    "Ελληνικά кириллица हिन्दी العربية 한국어 ไทย straße ſ K ﬁ\n",
] * 5  # fmt: skip

PATTERNS = {
    "recipes": SPLIT_PATTERN,
    "gpt2": GPT2_PATTERN,
    "gpt4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt4o": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "words": r"\w+|[^\w\s]+|\s+",
    "letters alone": r"\p{L}+",
    "ascii": r"[a-zA-Z]+(?:'[a-z]+)?|\d| ?[^\sA-Za-z0-9]+|\s",
}
"""Splits of other models, and two that nobody uses."""


def trained(
    pattern: str | None = SPLIT_PATTERN, size: int = 400, special: tuple[str, ...] = ("<|bos|>",)
) -> Tokenizer:
    """A byte-level BPE; without a pattern the pre-tokenizer's own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def edited(tokenizer: Tokenizer, edit) -> Tokenizer:
    """A tokenizer whose file was changed by hand."""
    content = json.loads(tokenizer.to_str())
    edit(content)
    return Tokenizer.from_str(json.dumps(content))


def shuffled_ids() -> Tokenizer:
    """Its ids say nothing of the order of merges."""

    def edit(content):
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values())
        random.Random(0).shuffle(ids)
        content["model"]["vocab"] = dict(zip(vocabulary, ids, strict=True))
        for token in content["added_tokens"]:
            token["id"] = content["model"]["vocab"][token["content"]]

    return edited(trained(), edit)


def shuffled_merges() -> Tokenizer:
    """Tokens that cannot arise any more are among them."""

    def edit(content):
        random.Random(1).shuffle(content["model"]["merges"])

    return edited(trained(), edit)


def many_merges(ignore_merges: bool) -> Tokenizer:
    """Every two tokens whose text is a token are a merge, as in files that were made from ranks."""

    def edit(content):
        model = content["model"]
        vocabulary = model["vocab"]
        pairs = [
            (token_id, token[:i], token[i:])
            for token, token_id in vocabulary.items()
            for i in range(1, len(token))
            if token != "<|bos|>" and token[:i] in vocabulary and token[i:] in vocabulary
        ]
        model["merges"] = [[left, right] for _, left, right in sorted(pairs)]
        model["ignore_merges"] = ignore_merges

    return edited(trained(), edit)


QUICK = {
    **{name: lambda pattern=pattern: trained(pattern) for name, pattern in PATTERNS.items()},
    "bytes alone": lambda: trained(size=257),
    "larger": lambda: trained(size=700),
    "gpt2 file": lambda: trained(None, special=("<|endoftext|>",)),
    "shuffled ids": shuffled_ids,
    "shuffled merges": shuffled_merges,
    "many merges": lambda: many_merges(False),
    "whole pieces first": lambda: many_merges(True),
}
"""What `tiktoken` can express."""


def byte_fallback() -> Tokenizer:
    vocabulary = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab"]
    tokenizer = Tokenizer(models.BPE(
        {token: i for i, token in enumerate(vocabulary)}, [("▁", "a"), ("a", "b")],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    ))  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"<s>": 0, "[UNK]": 1, "a": 2, "##b": 3}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def changed(**attributes) -> Tokenizer:
    tokenizer = trained()
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def truncated() -> Tokenizer:
    tokenizer = trained()
    tokenizer.enable_truncation(5)
    return tokenizer


def byte_missing() -> Tokenizer:
    def edit(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["unused"] = vocabulary.pop("!")

    return edited(trained(size=257), edit)


def stuck_at_two() -> Tokenizer:
    """A token that is taken for a whole piece, but is no merge of its two parts elsewhere."""

    def edit(content):
        content["model"]["ignore_merges"] = True
        content["model"]["vocab"]["~~"] = len(content["model"]["vocab"])

    return edited(trained(size=257), edit)


SLOW = {
    "byte fallback": byte_fallback,
    "metaspace": metaspace,
    "unigram": unigram,
    "word pieces": word_pieces,
    "normalizer": lambda: changed(normalizer=normalizers.NFC()),
    "prefix space": lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no split": lambda: changed(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ),
    "digits": lambda: changed(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "no pre-tokenizer": lambda: changed(pre_tokenizer=None),
    "truncation": truncated,
    "byte missing": byte_missing,
    "stuck at two": stuck_at_two,
    "anchored": lambda: trained(r"^a|\s+|\S+"),
    "any character": lambda: trained(r".|\n"),
    "braces, possessive here and not there": lambda: trained(r"\p{N}{1,2}+|\p{L}+|[^\p{L}\p{N}]"),
}
"""What it cannot, or is not known to."""


def expected(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return [e.ids for e in copy.encode_batch(texts, add_special_tokens=False)]


def encoder_of(tokenizer: Tokenizer) -> TextEncoder:
    encoder = document_encoder(tokenizer, np.dtype(np.uint32))
    # Only what comes after the first documents is encoded in one way alone.
    encoder._to_compare = 0
    return encoder


def check(tokenizer: Tokenizer, texts: list[str]) -> None:
    found = encoder_of(tokenizer).encode(texts, parallel=False)
    assert [ids.tolist() for ids in found] == expected(tokenizer, texts)


@pytest.fixture(scope="module")
def quick() -> dict[str, Tokenizer]:
    return {name: make() for name, make in QUICK.items()}


PIECES = st.sampled_from([
    "'s", "'S", "'Ll", "'ſ", "don't", "<|bos|>", "<|endoftext|>", " ", "  ", "\n", "\r\n", " \n ",
    "\t", "\xa0", "\u3000", "\u2028", "\x85", "a", "ab", "aab", "the", "Straße", "ﬁ", "K", "İ",
    "1", "12", "1234", "²", "٣", "日本語", "é", "e\u0301", "\u0301", "👍🏽", "ไทย", "=",
    "==", "-", "!?", "~~", "\ufeff", "\x00", "\U000e0001", "\U0010ffff", "\u0378",
])  # fmt: skip
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=30),
        st.lists(st.one_of(PIECES, st.characters(exclude_categories=["Cs"])), max_size=40)
        .map("".join),
        st.tuples(PIECES, st.integers(1, 300)).map(lambda pair: pair[0] * pair[1]),
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(texts=TEXTS)
@pytest.mark.parametrize("name", QUICK)
def test_ids_are_those_of_tokenizers(name, texts, quick):
    encoder = encoder_of(quick[name])
    assert encoder.reason is None
    check(quick[name], texts)


@pytest.mark.parametrize("name", SLOW)
def test_what_tiktoken_cannot_express_goes_the_slow_way(name):
    tokenizer = SLOW[name]()
    encoder = encoder_of(tokenizer)
    assert encoder.reason
    check(tokenizer, [*CORPUS[:4], "ab  ~~ ~~~ a\n1234"])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_any_list_of_merges_is_expressed(ignore_merges, data):
    """Several merges for one token, in any order, of tokens that come later or cannot arise."""
    letters, tokens, merges = "abc", list("abc"), []
    for _ in range(data.draw(st.integers(0, 12))):
        pair = (data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens)))
        merges.append(pair)
        tokens = list(dict.fromkeys([*tokens, "".join(pair)]))
    merges = data.draw(st.permutations(list(dict.fromkeys(merges))))
    vocabulary = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *tokens])
    model = models.BPE(
        {token: i for i, token in enumerate(vocabulary)}, merges, ignore_merges=ignore_merges
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = data.draw(st.lists(st.text(alphabet=letters + " ", max_size=14), max_size=12))
    texts += [f"{a}{b}" for a in tokens for b in tokens]
    try:
        ranks = ranks_of(tokenizer)
    except UnsuitedError:
        assert ignore_merges
        return
    own = tiktoken.Encoding(
        "own", pat_str=ranks.pattern, mergeable_ranks=ranks.ranks, special_tokens={}
    )
    found = [ranks.ids[own.encode_ordinary(text)].tolist() if text else [] for text in texts]
    assert found == expected(tokenizer, texts)


def test_a_special_token_that_is_spelled_out_is_text():
    tokenizer = trained()
    encoder = encoder_of(tokenizer)
    assert encoder._quickly("a <|bos|> b") is not None
    (ids,) = encoder.encode(["a <|bos|> b"])
    assert (ids != 0).all()
    assert tokenizer.decode(ids.tolist()) == "a <|bos|> b"


def test_tokens_that_are_not_special_are_found_in_text():
    tokenizer = trained()
    tokenizer.add_tokens(["<tool>", AddedToken("spaced", lstrip=True, single_word=True)])
    texts = ["a <tool>b", " spaced out", "unspaced", "a <too l>"]
    encoder = encoder_of(tokenizer)
    assert [encoder._quickly(text) is None for text in texts] == [True, True, True, False]
    check(tokenizer, texts)


def test_a_tokenizer_that_is_changed_gets_another_encoder():
    tokenizer = trained()
    first = encoder_of(tokenizer)
    assert encoder_of(tokenizer) is first
    tokenizer.add_tokens(["return"])
    check(tokenizer, CORPUS[:2])
    tokenizer.normalizer = normalizers.Lowercase()
    check(tokenizer, CORPUS[:2])


RUNS = ["a", " ", "\n", "=", "é", "語", "ab", " \n", "1", "'", "a\u0301"]


@pytest.mark.parametrize("name", ["recipes", "gpt2 file", "gpt4"])
def test_long_runs_without_a_place_to_split(name, quick):
    check(quick[name], [run * (20_000 // len(run)) + "b" for run in RUNS])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipes", "gpt2 file", "gpt4o"])
def test_very_long_runs(name, quick):
    check(quick[name], [run * (2**18 // len(run.encode())) + "b" for run in ("a", " ", "\n", "é")])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipes", "gpt4o", "words"])
def test_every_character_there_is(name, quick):
    """The engines' tables of Unicode are of different years."""
    codes = [
        *range(0xD800), *range(0xE000, 0x33500), *range(0x33500, 0xE0000, 97),
        *range(0xE0000, 0xE0200), *range(0xE0200, 0x110000, 97),
    ]  # fmt: skip
    texts = [
        "".join(f"x{chr(code)}1{chr(code)} " for code in codes[i : i + 200])
        for i in range(0, len(codes), 200)
    ]
    check(quick[name], texts)


def test_characters_that_the_engines_know_differently_go_the_slow_way(quick):
    encoder = encoder_of(quick["words"])
    # Marks of an enclosing kind, and what joins emoji, are of a word to one of them alone.
    different = [chr(c) for c in range(0x80, 0x3000) if not encoder._characters.are_alike(chr(c))]
    assert different
    assert all(encoder._quickly(f"a{c}b") is None for c in different)
    check(quick["words"], [f"a{c}b" for c in different])


def test_a_lone_surrogate_is_refused_as_tokenizers_refuses_it(quick):
    with pytest.raises((TypeError, UnicodeEncodeError)) as theirs:
        quick["recipes"].encode("a \ud83d b")
    with pytest.raises(theirs.type):
        encoder_of(quick["recipes"]).encode(["a", "a \ud83d b"], parallel=False)


def test_what_the_first_documents_show_is_believed(caplog, quick):
    tokenizer = quick["recipes"]
    right = ranks_of(tokenizer)
    data = [*right.ranks]
    # The two last merges change places: only a text that has them can tell.
    swapped = {d: i for i, d in enumerate([*data[:256], *data[:255:-1]])}
    ids = np.array([*right.ids[:256], *right.ids[:255:-1]])
    with caplog.at_level(logging.WARNING):
        encoder = TextEncoder(
            tokenizer, lambda texts: expected(tokenizer, texts),
            ranks=Ranks(right.pattern, swapped, ids),
        )  # fmt: skip
        found = encoder.encode(CORPUS)
    assert "gives other ids" in encoder.reason
    assert len(caplog.records) == 1
    assert [ids.tolist() for ids in found] == expected(tokenizer, CORPUS)


def test_without_tiktoken_the_slow_way_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = trained()
    assert "tiktoken is missing" in encoder_of(tokenizer).reason
    check(tokenizer, CORPUS)


def test_nothing_is_fetched_from_anywhere(monkeypatch):
    def refuse(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert encoder_of(trained()).reason is None


def test_threads_give_the_same_ids_in_the_same_order(quick, monkeypatch):
    monkeypatch.setattr(encoding, "_n_thread", lambda: 4)
    encoder = encoder_of(quick["recipes"])
    texts = [f"{i} {text}" for i, text in enumerate(CORPUS * 20)]
    found = [ids.tolist() for ids in encoder.encode(texts)]
    assert found == [ids.tolist() for ids in encoder.encode(texts, parallel=False)]


def test_both_ways_write_the_same_shards(synthetic, tmp_path, monkeypatch, capsys):
    def files(corpus):
        corpus.prepare(processes=1)
        paths = [path for path in corpus.directory.rglob("*") if path.is_file()]
        return {path.relative_to(corpus.directory): path.read_bytes() for path in paths}

    quick = files(make_corpus(tmp_path / "quick", synthetic))
    assert "tiktoken" not in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert files(make_corpus(tmp_path / "slow", synthetic)) == quick
    assert "tiktoken is missing" in capsys.readouterr().err


@pytest.mark.parametrize("special", ["<|bos|>", "<|endoftext|>"])
def test_prompts_hold_special_tokens_as_transformers_finds_them(special, monkeypatch):
    monkeypatch.setattr(evaluation.encoding, "WORTH_CHARS", 1)
    monkeypatch.setattr(encoding, "COMPARED_CHARS", 0)
    tokenizer = trained(special=(special,))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special} $A", special_tokens=[(special, 0)]
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special)
    encoder = evaluation.encoding.Encoder(theirs)
    texts = [f"a {special}b", f"{special}", "plain text", *CORPUS[:4]]
    encoder.encode_many(texts)
    assert encoder._fast.reason is None
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert encoder.encode(text).tolist() == ids
    assert 0 in encoder.encode(texts[0])


def test_a_tokenizer_class_of_its_own_is_asked_itself(monkeypatch):
    monkeypatch.setattr(evaluation.encoding, "WORTH_CHARS", 1)

    class Upper(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *arguments, **options):
            text = [t.upper() for t in text] if isinstance(text, list) else text.upper()
            return super()._encode_plus(text, *arguments, **options)

    own = Upper(tokenizer_object=trained(), bos_token="<|bos|>")
    encoder = evaluation.encoding.Encoder(own)
    encoder.encode_many(["abc"])
    assert encoder._fast is None
    assert encoder.encode("abc").tolist() == own("ABC", add_special_tokens=False)["input_ids"]
