"""Rows shared by processes: replicated and sharded models, too many ranks, failures on one."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from evaluation_material import VOCAB_SIZE, make_llama
from processes import in_processes
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedTokenizerFast
from variants import make_model, perturb

from bov_lightning.distributed.ranks import Ranks
from bov_lightning.distributed.sharding import make_mesh, shard
from bov_lightning.errors import EvaluationInterruptedError, RankFailedError, UserError
from bov_lightning.model.config import ValueConfig
from evaluation.backends import HuggingFaceBackend, TransformerBackend
from evaluation.runner import Benchmarks, Runtime, run

pytestmark = pytest.mark.distributed


def build(kind: str, sharded: bool):
    if kind == "llama":
        model = make_llama()
        layers, backend = model.model.layers, HuggingFaceBackend
    else:
        value = ValueConfig("bank", "last_third", "learned")
        model = perturb(make_model(value, vocab_size=VOCAB_SIZE), smear=0.9)
        layers, backend = model.blocks, TransformerBackend
    if sharded and backend is TransformerBackend:
        shard(model, make_mesh("cpu", dist.get_world_size(), 1), None)
    elif sharded:
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
    return model, backend(model)


def summary(results: dict) -> dict:
    """Outcomes and scores, as JSON keeps them."""
    return {
        task: [[s["acc"], [list(map(float, r)) for r in s["filtered_resps"]]] for s in samples]
        for task, samples in results["samples"].items()
    }


def evaluate(rank: int, world: int, kind: str, how: str, benchmarks: Benchmarks, tok: str) -> dict:
    model, backend = build(kind, how == "sharded")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tok)
    results = run(model, backend, tokenizer, benchmarks, Runtime(budget=300))
    if how == "sharded":
        # As before the evaluation: parameters are shards again.
        assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
    return summary(results)


def fail(rank: int, world: int, kind: str, how: str, benchmarks: Benchmarks, tok: str) -> dict:
    """What every rank raises when the last one fails in its second forward."""
    model, _ = build(kind, False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tok)
    calls = []

    class Failing(TransformerBackend):
        def __call__(self, *args):
            calls.append(True)
            if rank == world - 1 and len(calls) == 2 and how == "fails":
                raise RuntimeError("out of luck")
            return super().__call__(*args)

    def stop() -> bool:
        return how == "stops" and rank == world - 1 and len(calls) == 2

    if how == "data" and rank == world - 1:
        benchmarks = replace(benchmarks, data_dir="nowhere")
    try:
        runtime = Runtime(budget=100, should_stop=stop)
        run(model, Failing(model), tokenizer, benchmarks, runtime)
    except (RankFailedError, EvaluationInterruptedError, UserError, RuntimeError) as error:
        return {"kind": type(error).__name__, "message": str(error), "calls": len(calls)}
    return {}


def generate(rank: int, world: int, kind: str, how: str, benchmarks: Benchmarks, tok: str) -> dict:
    from lm_eval.api.instance import Instance

    from evaluation.lm import BatchedLM

    _, backend = build(kind, how == "sharded")
    lm = BatchedLM(backend, PreTrainedTokenizerFast.from_pretrained(tok), budget=20)
    texts = ["the parser", "x is", "a value of the option"]
    requests = [
        Instance("generate_until", {}, (text, {"max_gen_toks": 3 + 4 * i}), 0, ("t", i, 1))
        for i, text in enumerate(texts)
    ]
    rolling = [Instance("loglikelihood_rolling", {}, (t,), 0, ("t", i, 1))
               for i, t in enumerate(texts)]  # fmt: skip
    with torch.no_grad():
        sums = lm.loglikelihood_rolling(rolling)
        return {"texts": lm.generate_until(requests), "sums": [round(s, 3) for s in sums]}


def close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for task, rows in expected.items():
        for (acc, scores), (other, others) in zip(rows, found[task], strict=True):
            assert acc == other
            for score, value in zip(scores, others, strict=True):
                assert value == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "how", "world"),
    [("ours", "replicated", 2), ("ours", "sharded", 2), ("llama", "sharded", 2),
     ("llama", "replicated", 3)],
)  # fmt: skip
def test_ranks_get_what_one_process_gets(kind, how, world, tokenizer, benchmarks):
    expected = evaluate(0, 1, kind, "alone", benchmarks, tokenizer.name_or_path)
    for found in in_processes(world, evaluate, kind, how, benchmarks, tokenizer.name_or_path):
        close(found, expected)


def test_more_ranks_than_rows(tokenizer, benchmarks):
    few = replace(benchmarks, tasks=("tiny_choice",), max_per_task=2)
    expected = evaluate(0, 1, "ours", "alone", few, tokenizer.name_or_path)
    found = in_processes(3, evaluate, "ours", "sharded", few, tokenizer.name_or_path)
    for results in found:
        close(results, expected)


@pytest.mark.parametrize(
    ("how", "kinds"),
    [("fails", ["RankFailedError", "RuntimeError"]),
     ("stops", ["EvaluationInterruptedError"] * 2), ("data", ["UserError"] * 2)],
)  # fmt: skip
def test_what_happens_on_one_rank_ends_all(how, kinds, tokenizer, benchmarks):
    found = in_processes(2, fail, "ours", how, benchmarks, tokenizer.name_or_path)
    assert [result["kind"] for result in found] == kinds
    assert found[0]["calls"] == found[1]["calls"]
    if how != "stops":
        expected = "out of luck" if how == "fails" else "nowhere holds no tiny_choice.jsonl"
        assert all(expected in result["message"] for result in found)


def test_generation_and_rolling_likelihood_on_sharded_ranks(tokenizer, benchmarks):
    expected = generate(0, 1, "ours", "alone", benchmarks, tokenizer.name_or_path)
    found = in_processes(2, generate, "ours", "sharded", benchmarks, tokenizer.name_or_path)
    assert all(results["texts"] == expected["texts"] for results in found)
    for results in found:
        assert results["sums"] == pytest.approx(expected["sums"], abs=2e-3)


def test_a_single_process_needs_no_agreement():
    ranks = Ranks.of_job()
    assert (ranks.rank, ranks.size, ranks.maximum([1.5]), ranks.gather(3)) == (0, 1, [1.5], [3])
    with pytest.raises(KeyError):
        ranks.together(lambda: {}["missing"])
