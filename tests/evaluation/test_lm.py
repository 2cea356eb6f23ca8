"""Scores equal those of a plain loop, however rows are batched, shared and spread."""

from dataclasses import replace

import pytest
import torch
from evaluation_material import VOCAB_SIZE, make_llama, plain_row
from lm_eval.api.instance import Instance
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM
from variants import make_model, perturb

from bov_lightning.errors import EvaluationInterruptedError
from bov_lightning.model.config import ValueConfig
from evaluation.backends import HuggingFaceBackend, TransformerBackend
from evaluation.lm import BatchedLM
from evaluation.runner import Runtime, load_tasks, run

VALUES = {
    "bank": ValueConfig("bank", "last_third", "learned"),
    "gated": ValueConfig("bank", "every_second", "gate", add_context=True),
    "first_layer": ValueConfig("first_layer", "last_third", "learned", add_context=True),
    "initial_embedding": ValueConfig("initial_embedding", "last_third", 1.0),
}


def ours(value: str = "bank", **shape):
    # Windows of 128 tokens end within the prompts; the smear reaches across every seam.
    shape = {"n_layer": 3, "vocab_size": VOCAB_SIZE, "sequence_len": 512} | shape
    model = perturb(make_model(VALUES[value], **shape), smear=0.9)
    return model, TransformerBackend(model)


def hugging_face(kind: str):
    torch.manual_seed(0)
    if kind == "llama":
        model = make_llama()
    elif kind == "gpt2":  # learned positions
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=48, n_layer=2, n_head=4, n_positions=1024,
            initializer_range=0.3, bos_token_id=0, eos_token_id=0,
        ))  # fmt: skip
    else:  # windows of 24 tokens
        model = MistralForCausalLM(MistralConfig(
            vocab_size=VOCAB_SIZE, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=24,
            max_position_embeddings=2048, initializer_range=0.3,
        ))  # fmt: skip
    return model.eval(), HuggingFaceBackend(model.eval())


def logprobs(results: dict) -> dict[tuple[str, int], list[float]]:
    return {
        (task, sample["doc_id"]): [float(r[0]) for r in sample["filtered_resps"]]
        for task, samples in results["samples"].items()
        for sample in samples
    }


def outcomes(results: dict) -> dict[str, list[float]]:
    return {t: [s["acc"] for s in samples] for t, samples in results["samples"].items()}


def check_against_plain_loop(model, backend, tokenizer, benchmarks) -> None:
    loaded = load_tasks(benchmarks)
    results = run(model, backend, tokenizer, benchmarks, Runtime(budget=600), tasks=loaded)
    assert not results["evaluation"]["cropped_prompts"]
    found, n_row = logprobs(results), 0
    for name, task in loaded["tasks"].items():
        for doc, correct in zip(task.test_docs(), outcomes(results)[name], strict=True):
            expected = plain_row(task, doc, model, tokenizer, 0)
            assert found[name, doc["index"]] == pytest.approx(expected["logprobs"], abs=1e-4)
            assert correct == expected["correct"]
            n_row += 1
    assert n_row == 42


def slow_but(first: str, names) -> list:
    """All names as parameters; all but the first are left to the slow tests."""
    return [n if n == first else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("value", slow_but("bank", VALUES))
def test_our_models_score_as_a_plain_loop_does(value, tokenizer, benchmarks):
    check_against_plain_loop(*ours(value), tokenizer, benchmarks)


@pytest.mark.parametrize("kind", slow_but("llama", ["llama", "gpt2", "mistral"]))
def test_hugging_face_models_score_as_a_plain_loop_does(kind, tokenizer, benchmarks):
    check_against_plain_loop(*hugging_face(kind), tokenizer, benchmarks)


@pytest.mark.slow
@pytest.mark.parametrize("make", [ours, lambda: hugging_face("llama")], ids=["ours", "llama"])
def test_batches_and_sharing_change_nothing(make, tokenizer, benchmarks):
    model, backend = make()
    base = run(model, backend, tokenizer, benchmarks)
    for budget, share in ((1, True), (256, True), (8192, False), (100, False)):
        other = run(model, backend, tokenizer, benchmarks, Runtime(budget, share))
        assert outcomes(other) == outcomes(base)
        for key, values in logprobs(base).items():
            assert logprobs(other)[key] == pytest.approx(values, abs=1e-4)


@pytest.mark.slow
def test_models_in_which_documents_end_at_bos_are_scored_alike(tokenizer, benchmarks):
    check_against_plain_loop(*ours(document_start=0), tokenizer, benchmarks)


def test_every_token_of_the_prefix_is_computed_once(tokenizer, benchmarks):
    model, _ = ours()
    fed = []

    class Counting(TransformerBackend):
        def __call__(self, ids_BT, lengths, positions_BP, cache=None):
            fed.append(sum(lengths))
            return super().__call__(ids_BT, lengths, positions_BP, cache)

    one = replace(benchmarks, tasks=("tiny_choice",))
    run(model, Counting(model), tokenizer, one)
    shared = sum(fed)
    fed.clear()
    run(model, Counting(model), tokenizer, one, Runtime(share_prefix=False))
    assert shared < 0.4 * sum(fed)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, 0, ("t", i, 1)) for i, args in enumerate(arguments)]


@torch.no_grad()
def plain_logprob(model, ids: list[int], start: int) -> tuple[float, bool]:
    output = model(torch.tensor([ids]))
    logits = getattr(output, "logits", output)[0].float().log_softmax(-1)
    picked = [float(logits[i - 1, ids[i]]) for i in range(start, len(ids))]
    greedy = [int(logits[i - 1].argmax()) == ids[i] for i in range(start, len(ids))]
    return sum(picked), all(greedy)


@pytest.mark.parametrize("make", [ours, lambda: hugging_face("llama")], ids=["ours", "llama"])
def test_requests_of_any_other_task(make, tokenizer):
    model, backend = make()
    lm = BatchedLM(backend, tokenizer, budget=100)
    pairs = [("the parser", " option"), ("", "help x"), ("a b ", "c d e"), ("the ", ""), ("", "x")]
    with torch.no_grad():
        found = lm.loglikelihood(requests("loglikelihood", pairs))
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        stripped = context.rstrip()
        start = 1 + len(tokenizer.encode(stripped, add_special_tokens=False))
        ids = [0, *tokenizer.encode(context + continuation, add_special_tokens=False)]
        expected = plain_logprob(model, ids, start)
        assert (logprob, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])


@pytest.mark.parametrize("make", [ours, lambda: hugging_face("llama")], ids=["ours", "llama"])
def test_rolling_likelihood_covers_texts_longer_than_the_context(make, tokenizer):
    model, backend = make()
    backend.max_length = 16
    lm = BatchedLM(backend, tokenizer, budget=100)
    texts = ["the parser is not an option of the argument value " * 3, "x", ""]
    with torch.no_grad():
        found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in texts]))
    for text, nats in zip(texts, found, strict=True):
        ids = [0, *tokenizer.encode(text, add_special_tokens=False)]
        expected = plain_logprob(model, ids[:17], 1)[0]
        for end in range(33, len(ids) + 16, 16):
            # Every window but the first has all the context that fits.
            stop = min(end, len(ids))
            scored = stop - (end - 16)
            if scored > 0:
                window = ids[stop - 17 : stop]
                expected += plain_logprob(model, window, len(window) - scored)[0]
        assert nats == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "make", [ours, lambda: hugging_face("llama"), lambda: hugging_face("mistral")],
    ids=["ours", "llama", "mistral"],
)  # fmt: skip
def test_generated_text_is_what_the_whole_context_gives(make, tokenizer):
    model, backend = make()
    lm = BatchedLM(backend, tokenizer, budget=64)
    prompts = ["the parser is", "x", "a value of the option in the help is not the argument"]
    options = {"until": ["\n\n"], "max_gen_toks": 12}
    with torch.no_grad():
        found = lm.generate_until(requests("generate_until", [(p, options) for p in prompts]))
        for prompt, text in zip(prompts, found, strict=True):
            ids = [0, *tokenizer.encode(prompt, add_special_tokens=False)]
            new: list[int] = []
            while len(new) < 12 and "\n\n" not in tokenizer.decode(new):
                output = model(torch.tensor([ids + new]))
                token = int(getattr(output, "logits", output)[0, -1].argmax())
                if token == 0:
                    break
                new.append(token)
            assert text == tokenizer.decode(new).split("\n\n")[0]


def test_stop_sequences_and_sampling(tokenizer):
    _, backend = ours()
    lm = BatchedLM(backend, tokenizer)
    with torch.no_grad():
        free, stopped, *sampled = lm.generate_until(requests("generate_until", [
            ("the parser", {"max_gen_toks": 20}),
            ("the parser", {"max_gen_toks": 20, "until": " "}),
            *[("the parser", {"max_gen_toks": 20, "do_sample": True, "temperature": 5.0,
                              "top_k": 50, "top_p": 0.99})] * 2,
        ]))  # fmt: skip
    assert stopped == free.split(" ")[0]
    assert sampled[0] != sampled[1]


def test_prompts_longer_than_the_context_keep_their_end_and_are_counted(tokenizer, benchmarks):
    model, _ = ours()
    backend = TransformerBackend(model, max_length=40)
    loaded = load_tasks(benchmarks)
    results = run(model, backend, tokenizer, benchmarks, tasks=loaded)
    cropped = results["evaluation"]["cropped_prompts"]
    assert set(cropped) == {"tiny_choice", "tiny_schema", "tiny_lm"}
    task, found = loaded["tasks"]["tiny_choice"], logprobs(results)
    n_long = 0
    for doc in task.test_docs():
        prompts = task.prompts(doc)
        whole = [[0, *tokenizer.encode("".join(prompts.blocks) + item)] for item in prompts.items]
        n_long += sum(len(ids) > 40 for ids in whole)
        start = next(i for i in range(999) if len({tuple(ids[: i + 1]) for ids in whole}) > 1)
        for ids, logprob in zip(whole, found["tiny_choice", doc["index"]], strict=True):
            excess = max(0, len(ids) - 40)
            expected = plain_logprob(model, ids[excess:], max(1, start - excess))
            assert logprob == pytest.approx(expected[0], abs=1e-4)
    assert cropped["tiny_choice"] == n_long


def test_a_time_limit_leaves_rows_out_and_says_so(tokenizer, benchmarks, monkeypatch):
    monkeypatch.setattr("evaluation.lm.ROWS_PER_WAVE", 4)
    model, backend = ours()
    whole = run(model, backend, tokenizer, benchmarks)
    limited = run(model, backend, tokenizer, replace(benchmarks, time_limit=1e-9))
    assert limited["evaluation"]["rows_left_out"] == dict.fromkeys(benchmarks.tasks, 10)
    for task in benchmarks.tasks:
        assert limited["results"][task]["sample_len"] == 4
        assert outcomes(limited)[task] == outcomes(whole)[task][:4]


def test_an_evaluation_can_be_stopped_between_batches(tokenizer, benchmarks):
    model, backend = ours()
    model.train()
    state = torch.get_rng_state()
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(EvaluationInterruptedError):
        run(model, backend, tokenizer, benchmarks, Runtime(100, should_stop=stop))
    assert len(asked) == 3
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
