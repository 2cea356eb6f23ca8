"""CORE through the lm-eval model against a plain loop that scores one row at a time.

    python benchmarks/core.py [--model DIR] [--data-dir DIR] [--rows 24] [--suite-rows 60]

The plain loop tokenises every prompt of a row whole and runs them as one padded batch with full
logits, as the reference does. Both score the same model; their outcomes must agree row by row.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

from harness import report

from evaluation.command import load_model
from evaluation.runner import Benchmarks, load_tasks, run
from evaluation.scorer import CoreTask

SHARED = Path(os.environ.get("BOV_SHARED", Path(__file__).parents[2] / "shared"))
TASKS = {"arc_easy": 1, "commonsense_qa": 1, "winogrande": 4, "lambada_openai": 4}
"""Tasks with multiples of --rows: short prompts need more rows for a time worth measuring."""


@torch.no_grad()
def plain_row(task: CoreTask, doc: dict, model: Any, tokenizer: Any, bos: int) -> dict[str, Any]:
    """One row, from the protocol's description alone.

    Returns:
        ``correct``; ``logprobs`` and ``n_byte`` of the scored tokens, per prompt.
    """
    prompts = task.prompts(doc)
    texts = ["".join(prompts.blocks) + item for item in prompts.items]
    if task.kind == "language_modeling":
        texts[0] = texts[0].strip()
    ids = [[bos, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    if task.kind == "schema":
        shared = 0
        while len({row[-1 - shared] for row in ids}) == 1:
            shared += 1
        starts = [len(row) - shared for row in ids]
    elif task.kind == "multiple_choice":
        start = 0
        while len({row[start] if start < len(row) else None for row in ids}) == 1:
            start += 1
        starts = [start] * len(ids)
    else:
        without, with_ = ids
        assert with_[: len(without)] == without
        ids, starts = [with_], [len(without)]
    width = max(map(len, ids))
    padded = torch.tensor([row + [bos] * (width - len(row)) for row in ids])
    output = model(padded)
    logits = getattr(output, "logits", output).float()
    nats = -F.cross_entropy(logits[:, :-1].flatten(0, 1), padded[:, 1:].flatten(), reduction="none")
    nats = nats.view(len(ids), -1)
    logprobs = [
        float(nats[i, s - 1 : len(row) - 1].sum())
        for i, (s, row) in enumerate(zip(starts, ids, strict=True))
    ]
    n_byte = [len(tokenizer.decode(row[s:]).encode()) for s, row in zip(starts, ids, strict=True)]
    if task.kind == "language_modeling":
        predicted = logits[0, starts[0] - 1 : len(ids[0]) - 1].argmax(-1)
        correct = predicted.tolist() == ids[0][starts[0] :]
    else:
        costs = [-a / b for a, b in zip(logprobs, n_byte, strict=True)]
        correct = costs.index(min(costs)) == doc["gold"]
    return {"correct": correct, "logprobs": logprobs, "n_byte": n_byte}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(SHARED / "parity" / "core"))
    data = os.environ.get("BOV_EVAL_DATA", SHARED / "eval_bundle")
    parser.add_argument("--data-dir", default=data)
    parser.add_argument("--rows", type=int, default=24, help="rows per task in the comparisons")
    parser.add_argument("--repeats", type=int, default=3, help="of plain loop and ours, in turns")
    parser.add_argument("--suite-rows", type=int, default=60, help="rows per task in the suite")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, backend, tokenizer = load_model(options.model, "cpu", torch.float32)
    seconds: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for name, multiple in TASKS.items():
        benchmarks = Benchmarks((f"core_{name}",), multiple * options.rows, str(options.data_dir))
        timings: dict[str, list[float]] = {name: [], f"{name}_plain": []}
        for _ in range(options.repeats):
            loaded = load_tasks(benchmarks)
            task = loaded["tasks"][f"core_{name}"]
            started = time.perf_counter()
            outcomes = [
                plain_row(task, doc, model, tokenizer, tokenizer.bos_token_id)["correct"]
                for doc in task.test_docs()
            ]
            timings[f"{name}_plain"].append(time.perf_counter() - started)
            started = time.perf_counter()
            results = run(model, backend, tokenizer, benchmarks, tasks=loaded)
            timings[name].append(time.perf_counter() - started)
            ours = [bool(sample["acc"]) for sample in results["samples"][f"core_{name}"]]
            assert ours == outcomes, f"{name}: the outcomes differ"
        seconds |= {key: statistics.median(values) for key, values in timings.items()}
        ratios[name] = seconds[f"{name}_plain"] / seconds[name]
    benchmarks = Benchmarks(("core_paper",), options.suite_rows, str(options.data_dir))
    started = time.perf_counter()
    results = run(model, backend, tokenizer, benchmarks)
    seconds["suite"] = time.perf_counter() - started
    settings = {"rows": options.rows, "suite_rows": options.suite_rows, "threads": options.threads}
    core = results["groups"]["core_paper"]["centered,none"]
    report("core", settings, seconds, ratios, core_paper=round(core, 4))


if __name__ == "__main__":
    main()
