"""Benchmarks small enough for tests: a tokenizer, three tasks, models of both kinds."""

import json
import random
import sysconfig
from pathlib import Path

import pytest
from evaluation_material import VOCAB_SIZE
from transformers import PreTrainedTokenizerFast

from data_modules.tokenizer import TokenizerConfig, save_tokenizer, train_tokenizer
from evaluation.runner import Benchmarks

TASK = """\
task: {name}
class: !function evaluation.scorer.CoreTask
num_fewshot: {shots}
metadata:
  version: 1.0
  kind: {kind}
  delimiter: {delimiter}
  baseline: {{v1: {baseline}, v2: {baseline}}}
  file: {name}.jsonl
"""


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 ids."""
    directory = tmp_path_factory.mktemp("tokenizer")
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    save_tokenizer(train_tokenizer([text], TokenizerConfig(VOCAB_SIZE)), directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory) -> Path:
    """Three tasks, one of each kind, and their data; choices of one token and of many."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    words = [
        "a",
        "the",
        "parser",
        "argument",
        "of",
        "is",
        "not",
        "in",
        "option",
        "value",
        "—",
        "naïve",
        "é",
        "x",
        "y",
        "z",
        "help",
    ]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    choice, schema, lm = [], [], []
    for i in range(14):
        one = draw.sample(words, 4) if i % 3 == 0 else [text(1, 6) for _ in range(4)]
        choice.append({"query": text(3, 30), "choices": one, "gold": draw.randrange(4)})
        start = text(2, 12)
        options = [f"{start} {word}" for word in draw.sample(words, 2)]
        schema.append({
            "context_options": options, "continuation": text(2, 6), "gold": draw.randrange(2)
        })  # fmt: skip
        lm.append({"context": text(3, 30) + "  ", "continuation": text(1, 3)})
    for name, rows, kind, shots, delimiter, baseline in (
        ("tiny_choice", choice, "multiple_choice", 2, '"\\nAnswer: "', 0.25),
        ("tiny_schema", schema, "schema", 1, '" "', 0.5),
        ("tiny_lm", lm, "language_modeling", 2, '" "', 0.0),
    ):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"{name}.yaml").write_text(TASK.format(
            name=name, kind=kind, shots=shots, delimiter=delimiter, baseline=baseline
        ))  # fmt: skip
    return folder


@pytest.fixture
def benchmarks(tasks_folder) -> Benchmarks:
    """All three of them."""
    return Benchmarks(
        tasks=("tiny_choice", "tiny_schema", "tiny_lm"),
        data_dir=str(tasks_folder),
        include_path=str(tasks_folder),
    )
