"""Prompts put together from pieces have the tokens of whole prompts."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import byte_fallback, byte_level, unigram
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bov_lightning.errors import UserError
from evaluation.encoding import Encoder, Row, crop, document_start
from evaluation.scorer import Prompts, common_prefix

RAW = {"byte_level": byte_level, "byte_fallback": byte_fallback, "unigram": unigram}
TEXT = st.text(alphabet="ab .,\n\té—'0[", max_size=12)


def whole(tokenizer, text: str) -> list[int]:
    return [0, *tokenizer.encode(text, add_special_tokens=False)]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Merges across everything, blank lines included, and marks the start of every text."""
    pieces = ["<s>", "<unk>", "▁", "a", "b", "\n", "\n\n", "▁a", "b\n\n", "b\n\na", "\n\nb"]
    merges = [("\n", "\n"), ("▁", "a"), ("b", "\n\n"), ("b\n\n", "a"), ("\n\n", "b")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend("▁")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(blocks=st.lists(TEXT, max_size=3), items=st.lists(TEXT, min_size=2, max_size=3))
@pytest.mark.parametrize("kind", ["multiple_choice", "language_modeling"])
def test_pieces_tokenise_as_the_whole(kind, blocks, items, tokenizer):
    for own in (tokenizer, merging_tokenizer()):
        encoder = Encoder(own)
        prompts = Prompts(kind, tuple(block + "\n\n" for block in blocks), tuple(items))
        encoder.warm([prompts])
        head = "".join(prompts.blocks)
        expected = [whole(own, head + item) for item in items]
        if kind == "language_modeling":
            prompts = Prompts(kind, prompts.blocks, (items[0].rstrip(), items[1]))
            expected = [whole(own, (head + items[0]).strip()), whole(own, head + items[1])]
        assert [ids.tolist() for ids in encoder.prompt_ids(prompts)] == expected


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab", max_size=6), min_size=1, max_size=4))
def test_common_prefix(texts):
    n = common_prefix(texts)
    assert len({text[:n] for text in texts}) == 1
    assert n == min(map(len, texts)) or len({text[n] for text in texts}) > 1


def test_scored_tokens_start_where_choices_part_and_end_where_contexts_meet(tokenizer):
    encoder = Encoder(tokenizer)
    items = ("x the parser", "x the option")
    rows = encoder.rows(Prompts("multiple_choice", (), items))
    ids = [whole(tokenizer, item) for item in items]
    start = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    assert [(row.ids.tolist(), row.start) for row in rows] == [(i, start) for i in ids]
    for row, item in zip(rows, items, strict=True):
        text = tokenizer.decode(row.ids[start:].tolist())
        assert encoder.n_byte(row) == len(text.encode())
        assert item.endswith(text)

    items = ("a parser is long", "the value is long")
    rows = encoder.rows(Prompts("schema", (), items))
    tails = {tuple(row.ids[row.start :].tolist()) for row in rows}
    assert len(tails) == 1
    assert len({int(row.ids[row.start - 1]) for row in rows}) == 2


@pytest.mark.parametrize("kind", RAW)
@settings(max_examples=40, deadline=None)
@given(
    before=st.text(alphabet="once upn\n(", max_size=12),
    words=st.lists(st.sampled_from(["once", "read", "path", "时", "a"]), min_size=2, unique=True),
)
def test_bytes_are_those_of_the_text_in_every_kind_of_tokenizer(kind, before, words):
    """All tokens are scored, or those of the choices: together with the rest they are the text."""
    encoder = raw_encoder(kind)
    items = [f"once{before} {word} once" for word in words]
    for row, item in zip(encoder.rows(Prompts("multiple_choice", (), items)), items, strict=True):
        for start in {1, row.start}:
            tail = Row(row.ids, start)
            head = encoder.tokenizer.decode(row.ids[1:start].tolist())
            if "\ufffd" not in head:  # a character is not cut
                assert encoder.n_byte(tail) == len(item.encode()) - len(head.encode())


@cache
def raw_encoder(kind: str) -> Encoder:
    """As `transformers` reads a tokenizer that somebody has."""
    start = "<|endoftext|>" if kind == "byte_level" else "<s>"
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=RAW[kind](), bos_token=start))


@settings(max_examples=150, deadline=None)
@given(items=st.lists(TEXT, min_size=2, max_size=4))
@pytest.mark.parametrize("kind", ["multiple_choice", "schema"])
def test_every_choice_has_something_to_score(kind, items, tokenizer):
    """Equal ones, those that others begin with, and those that merge with what is before them."""
    for own in (tokenizer, merging_tokenizer()):
        rows = Encoder(own).rows(Prompts(kind, ("a b.\n\n",), tuple(items)))
        assert all(1 <= row.start < len(row.ids) for row in rows)


@settings(max_examples=300, deadline=None)
@given(context=TEXT, continuation=TEXT)
def test_pairs_are_scored_from_the_first_token_that_differs(context, continuation, tokenizer):
    for own in (tokenizer, merging_tokenizer()):
        row = Encoder(own).pair(context, continuation)
        before, ids = whole(own, context.rstrip()), whole(own, context + continuation)
        assert row.ids.tolist() == ids
        if before == ids:
            assert row.start == len(ids)  # nothing to score, which is refused
        else:
            assert 1 <= row.start < len(ids)
            assert before[: row.start] == ids[: row.start] or len(before) > len(ids)
            assert before[: row.start + 1] != ids[: row.start + 1]


def test_crop_keeps_the_end_and_one_token_of_context(tokenizer):
    encoder = Encoder(tokenizer)
    (row,) = encoder.rows(Prompts("language_modeling", (), ("the parser", "the parser is")))
    n = len(row.ids)
    assert crop(row, n) is row
    cropped = crop(row, n - 1)
    assert cropped.ids.tolist() == row.ids[1:].tolist()
    assert cropped.start == row.start - 1
    assert crop(row, 2).start == 1


def test_a_tokenizer_without_bos_starts_prompts_with_eos_or_is_refused():
    def make(**special) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.WordLevel({"a": 0, "<e>": 1, "?": 2}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(single="$A")
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    assert document_start(make(eos_token="<e>")) == 1
    with pytest.raises(UserError, match="neither a BOS nor an EOS token"):
        document_start(make())
