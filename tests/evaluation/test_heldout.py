"""The heldout tasks are pieces of the held-out documents, whatever the tokenizer."""

import json

import numpy as np
import pytest
from tokenizer_kinds import LINES, byte_fallback, byte_level, metaspace, unigram
from transformers import PreTrainedTokenizerFast

from evaluation.heldout import write_heldout

KINDS = {
    "byte_level": byte_level, "metaspace": metaspace, "byte_fallback": byte_fallback,
    "unigram": unigram,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_are_pieces_of_the_documents(kind, tmp_path):
    """Also where decoding takes the first space of a text away, as files of others do."""
    start = "<|endoftext|>" if kind == "byte_level" else "<s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), bos_token=start)
    texts = [" then\n".join(LINES[i : i + 6]) for i in range(20)]
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    bos = tokenizer.bos_token_id
    rows = np.array([[bos, *ids[: min(map(len, encoded))]] for ids in encoded])
    write_heldout(tmp_path / "heldout", rows, tokenizer, bos)

    def items(name: str) -> list[dict]:
        lines = (tmp_path / "heldout" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]

    last, cuts = items("last_token"), items("continuation")
    assert len(last) == len(cuts) == len(texts)
    pieces = [f"{item['context']} {item['continuation']}" for item in last]
    pieces += [f"{item['query']} {item['choices'][item['gold']]}" for item in cuts]
    for piece in pieces:
        assert any(text.startswith(piece) for text in texts), piece
