"""Tokenizers: byte counts, round trips, one tokenizer for tokenizers and transformers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from bov_lightning.errors import UserError
from data_modules.tokenizer import (
    TokenizerConfig,
    encode_documents,
    read_tokenizer,
    save_tokenizer,
    token_bytes,
    tokenizer_hash,
    train_tokenizer,
)

TEXT = [
    "def f(x): return x + 1234567\n",
    "naïve café — 日本語のテキスト\n",
    "  spaces\tand tabs\r\n",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, TokenizerConfig(vocab_size=300))


@settings(deadline=None)
@given(text=st.text())
def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(text):
    tokenizer = test_bytes_of_tokens_add_up_to_the_bytes_of_the_text.tokenizer
    ids = next(encode_documents(tokenizer, [text]))
    assert ids[0] == 0
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids[1:].tolist()) == text


@pytest.fixture(autouse=True)
def _give_tokenizer_to_property_test(tokenizer):
    test_bytes_of_tokens_add_up_to_the_bytes_of_the_text.tokenizer = tokenizer


def test_special_tokens_count_no_bytes(tokenizer):
    assert tokenizer.token_to_id("<|bos|>") == 0
    assert token_bytes(tokenizer)[0] == 0
    assert token_bytes(tokenizer)[1:].min() >= 1


def test_a_document_that_spells_out_a_special_token_is_text(tokenizer):
    (ids,) = encode_documents(tokenizer, ["a <|bos|> b"])
    assert (ids[1:] != 0).all()
    assert tokenizer.decode(ids[1:].tolist()) == "a <|bos|> b"


def test_numbers_split_into_pairs_of_digits(tokenizer):
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("x1234567")]
    assert pieces == ["x", "12", "34", "56", "7"]


def test_transformers_reads_the_same_tokenizer(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXT[:3]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text
    assert theirs.bos_token_id == 0
    assert tokenizer_hash(tmp_path) == tokenizer_hash(tmp_path)
    other = train_tokenizer(TEXT, TokenizerConfig(vocab_size=301))
    save_tokenizer(other, tmp_path / "other")
    assert tokenizer_hash(tmp_path) != tokenizer_hash(tmp_path / "other")


def test_caps_limit_what_the_tokenizer_reads():
    config = TokenizerConfig(vocab_size=260, max_chars_per_document=10)
    capped = train_tokenizer(["aaaaaaaaaa" + "zq" * 500] * 3, config)
    assert "zq" not in capped.get_vocab()
    config = TokenizerConfig(vocab_size=260, max_chars=10)
    capped = train_tokenizer(["aaaaaaaaaa", "zq" * 500], config)
    assert "zq" not in capped.get_vocab()


def test_too_little_text_for_the_vocabulary_is_an_error():
    with pytest.raises(UserError, match="more text"):
        train_tokenizer(["ab"], TokenizerConfig(vocab_size=1000))


def test_unreadable_tokenizer_is_an_error(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_tokenizer(tmp_path)
