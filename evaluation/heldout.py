"""Two small benchmarks made of a run's own held-out documents.

last_token: what is the next token, a word? continuation: which of four texts goes on with this one?
"""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np

from bov_lightning.errors import UserError
from bov_lightning.files import write_directory
from data_modules.tokenizer import transformers_tokenizer
from data_modules.vocabulary import Following

N_ROW = 200
"""Rows per task, at most."""
MIN_CONTEXT = 16
"""Tokens before the cut, at least."""
N_CONTINUATION = 12
"""Tokens of a continuation."""
N_CHOICE = 4
SEED = 0
MAX_ROWS_READ = 2000


def documents(rows: np.ndarray, bos: int) -> list[np.ndarray]:
    """The documents in packed rows (N, T+1), without their BOS."""
    found = []
    for row in rows:
        starts = np.flatnonzero(row == bos)
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            if end - start > MIN_CONTEXT + N_CONTINUATION:
                found.append(row[start + 1 : end])
    return found


def _last_token(ids: np.ndarray, text: Following) -> dict[str, str] | None:
    for at in range(len(ids) - 1, MIN_CONTEXT - 1, -1):
        token = text([int(ids[at])])
        if re.fullmatch(r" \w+", token):
            context = text.decode(ids[:at].tolist())
            return {"context": context, "continuation": token[1:]} if context.strip() else None
    return None


def _cut(ids: np.ndarray, text: Following) -> tuple[str, str] | None:
    for at in range(max(MIN_CONTEXT, len(ids) // 2), len(ids) - N_CONTINUATION + 1):
        if re.match(r" \w", text([int(ids[at])])):
            query = text.decode(ids[:at].tolist())
            after = text(ids[at : at + N_CONTINUATION].tolist())[1:].rstrip()
            return (query, after) if query.strip() and after else None
    return None


def write_heldout(directory: Path, rows: np.ndarray, tokenizer: Any, bos: int) -> None:
    """Writes last_token.jsonl and continuation.jsonl, the same for the same rows.

    Raises:
        UserError: the held-out rows hold too few documents.
    """
    texts = documents(rows[:MAX_ROWS_READ], bos)
    draw, text = random.Random(SEED), Following(tokenizer)
    draw.shuffle(texts)
    last = [item for ids in texts if (item := _last_token(ids, text))][:N_ROW]
    cuts = [cut for ids in texts if (cut := _cut(ids, text))][:N_ROW]
    if len(cuts) < 2 * N_CHOICE or not last:
        raise UserError(
            f"the held-out rows hold only {len(cuts)} documents that are long enough for the "
            "heldout tasks: hold more text out, or leave heldout out of evaluation.tasks"
        )
    choices = []
    for i, (query, after) in enumerate(cuts):
        others = draw.sample([c[1] for j, c in enumerate(cuts) if j != i], N_CHOICE - 1)
        gold = draw.randrange(N_CHOICE)
        others.insert(gold, after)
        choices.append({"query": query, "choices": others, "gold": gold})

    def write(aside: Path) -> None:
        for name, items in (("last_token", last), ("continuation", choices)):
            lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            (aside / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    write_directory(directory, write)


def write_from_data(directory: Path, data: Any) -> None:
    """The same, from a prepared CorpusDataModule."""
    tokenizer = transformers_tokenizer(data.tokenizer_directory)
    rows = data.val_rows.read(np.arange(min(len(data.val_rows), MAX_ROWS_READ)))
    write_heldout(directory, rows, tokenizer, data.document_start)


def needs_heldout(tasks: list[str] | tuple[str, ...]) -> bool:
    """Whether any of the tasks is made of held-out documents."""
    return any(task.startswith("heldout") for task in tasks)
