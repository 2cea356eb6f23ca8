"""Every causal model of ``transformers`` is scored exactly or refused, and so are rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_material import VOCAB_SIZE, make_llama, tiny
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from variants import make_model, perturb

from bov_lightning.errors import UserError
from bov_lightning.model.config import ValueConfig
from evaluation.backends import HuggingFaceBackend, TransformerBackend
from evaluation.command import load_model
from evaluation.lm import BatchedLM

pytestmark = pytest.mark.slow

MODELS = {
    "positions by slot": ("mpt", {}),
    "learned positions": ("gpt2", {}),
    "learned positions, shifted": ("opt", {}),
    "positions from ids": ("roberta", {"pad_token_id": 1, "max_position_embeddings": 98}),
    "biases by distance": ("bloom", {}),
    "biases or rotations": ("falcon", {"alibi": True}),
    "a window by slot": ("mistral", {"sliding_window": 12}),
    "windows in some layers": ("gemma2", {"sliding_window": 12}),
    "windows, other rotations": ("gemma3_text", {"sliding_window": 12}),
    "local layers": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "no cache": ("openai-gpt", {}),
    "a decoder of a pair": ("bart", {}),
    "a state": ("mamba", {"state_size": 4}),
    "another state": ("rwkv", {"context_length": 96, "attention_hidden_size": 48}),
    "rotations of a part": ("gpt_neox", {}),
    "parallel blocks": ("phi", {}),
    "experts": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
}
UNLIMITED = ("bloom", "mamba")
REFUSED = {
    "a masked model": ("bert", {"is_decoder": False}),
    "both directions": ("xlnet", {}),
}
FAST = ("positions by slot", "a window by slot", "no cache")


def some(names, fast) -> list:
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, 0, ("t", i // 3, 1)) for i, args in enumerate(arguments)]


TEXTS = ("the parser is", "x", "a value of the option in the help is not the argument of it")
CHOICES = (" option", " not what the help says", " y")
PAIRS = [(text, choice) for text in TEXTS for choice in CHOICES]


@torch.no_grad()
def logits_of(model, ids: list[int]) -> torch.Tensor:
    output = model(torch.tensor([ids]))
    return getattr(output, "logits", output)[0].float()


def check_exact(model, backend, tokenizer) -> BatchedLM:
    """Scores and texts against the model's plain call on one text after the other."""
    lm = BatchedLM(backend, tokenizer, budget=100)
    with torch.no_grad():
        found = lm.loglikelihood(requests("loglikelihood", PAIRS))
        options = {"until": [], "max_gen_toks": 6}
        texts = lm.generate_until(requests("generate_until", [(t, options) for t in TEXTS]))

    def encode(text: str) -> list[int]:
        return [0, *tokenizer.encode(text, add_special_tokens=False)]

    for (context, continuation), (logprob, _) in zip(PAIRS, found, strict=True):
        ids, start = encode(context + continuation), len(encode(context))
        of_each = logits_of(model, ids).log_softmax(-1)
        expected = sum(float(of_each[i - 1, ids[i]]) for i in range(start, len(ids)))
        assert logprob == pytest.approx(expected, abs=1e-3)
    for prompt, text in zip(TEXTS, texts, strict=True):
        ids, new = encode(prompt), []
        while len(new) < 6:
            token = int(logits_of(model, ids + new)[-1].argmax())
            if token == 0 or token in backend.end_tokens:
                break
            new.append(token)
        assert text == tokenizer.decode(new)
    return lm


@pytest.mark.parametrize("name", some(MODELS, FAST))
def test_models_of_every_make_are_scored_exactly(name, tokenizer):
    model = tiny(*MODELS[name])
    backend = HuggingFaceBackend(model)
    assert backend.max_length == (2048 if MODELS[name][0] in UNLIMITED else 96)
    check_exact(model, backend, tokenizer)


def test_rotations_that_depend_on_the_longest_text_end_the_context(tokenizer):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6,
            "long_factor": [4.0] * 6, "original_max_position_embeddings": 56}  # fmt: skip
    model = tiny("phi3", {"rope_parameters": rope, "original_max_position_embeddings": 56})
    short = torch.randint(1, VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        beside_a_long_one = model(input_ids=short).logits[0, :20]
        alone = model(input_ids=short[:1, :20]).logits[0]
    assert (beside_a_long_one - alone).abs().max() > 0.1  # what padding to a long row would do
    backend = HuggingFaceBackend(model)
    assert backend.max_length == 56
    check_exact(model, backend, tokenizer)


@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_texts_see_each_other_are_refused(name, tokenizer):
    lm = BatchedLM(HuggingFaceBackend(tiny(*REFUSED[name])), tokenizer)
    with pytest.raises(UserError, match="no causal language model"):
        lm.loglikelihood(requests("loglikelihood", PAIRS))


def test_where_only_the_kept_prefix_is_wrong_rows_are_computed_whole(tokenizer):
    class Forgetful(HuggingFaceBackend):
        def compute(self, ids_BT, lengths, positions_BP, cache=None):
            if cache is not None and cache.mask.shape[1]:
                cache.lengths = cache.lengths + 1  # every position is one too far
            return super().compute(ids_BT, lengths, positions_BP, cache)

    model = tiny("gpt2", {})
    lm = check_exact(model, Forgetful(model), tokenizer)
    assert not lm.share_prefix
    (note,) = lm.engine.notes
    assert "every row was computed whole" in note


def test_a_head_that_does_not_see_all_positions_is_left_alone(tokenizer):
    """A model that never calls its output embeddings, so that nothing is picked before them."""
    model = tiny("gpt2", {})
    model.get_output_embeddings = lambda: torch.nn.Linear(48, VOCAB_SIZE)
    check_exact(model, HuggingFaceBackend(model), tokenizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_weights_that_are_not_finite_are_named(kind, value, tokenizer):
    if kind == "ours":
        value_config = ValueConfig("bank", "last_third", "learned")
        model = perturb(make_model(value_config, vocab_size=VOCAB_SIZE), smear=0.5)
        backend, weight = TransformerBackend(model), model.blocks[1].mlp.output.weight
    else:
        model = make_llama()
        backend, weight = HuggingFaceBackend(model), model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[0, 0] = value
    lm = BatchedLM(backend, tokenizer)
    name = next(n for n, p in model.named_parameters() if p is weight)
    for call in (
        lambda: lm.loglikelihood(requests("loglikelihood", PAIRS)),
        lambda: lm.generate_until(requests("generate_until", [("x", {})])),
        lambda: lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("x",)])),
    ):
        with pytest.raises(UserError, match=f"not finite: {name} holds 1 of"):
            call()


def test_a_bad_row_of_the_embedding_names_the_row_that_meets_it(tokenizer):
    model = make_llama()
    lm = BatchedLM(HuggingFaceBackend(model), tokenizer)
    lm.engine.prepare()
    bad = tokenizer.encode("x", add_special_tokens=False)[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("nan")
    with pytest.raises(UserError, match="task t, row 1: "), torch.no_grad():
        lm.loglikelihood(requests("loglikelihood", PAIRS))
    with pytest.raises(UserError, match="task t, row 0: .*no token can be chosen"), torch.no_grad():
        lm.generate_until(requests("generate_until", [("x", {})]))


def test_the_probe_leaves_no_trace_and_is_made_once(tokenizer):
    model = make_llama()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    lm = BatchedLM(HuggingFaceBackend(model), tokenizer)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    lm.engine.prepare()
    n_call = len(calls)
    lm.engine.prepare()
    assert 0 < len(calls) == n_call < 10
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert all(p.grad is None for p in model.parameters())


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    lm = BatchedLM(HuggingFaceBackend(make_llama(vocab_size=150)), tokenizer)
    with pytest.raises(UserError, match="outside of the vocabulary of 150"):
        lm.loglikelihood(requests("loglikelihood", PAIRS))


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_seq_len", 48), ("n_ctx", 40), ("seq_length", 56), ("context_length", 64)],
)
def test_the_context_is_found_by_whichever_name(field, value):
    model = tiny("bloom", {})
    setattr(model.config, field, value)
    assert HuggingFaceBackend(model).max_length == value


def test_a_table_of_positions_ends_the_context_whatever_the_configuration_says():
    model = tiny("gpt2", {})
    model.config.n_positions = 4096
    assert HuggingFaceBackend(model).max_length == 96


# Weights that are those of the model.


@pytest.fixture
def llama_directory(tmp_path, tokenizer) -> Path:
    make_llama().save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def rename(directory: Path, change) -> None:
    file = directory / "model.safetensors"
    weights = load_file(file)
    save_file(change(weights), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {f"_orig_mod.{k}": t for k, t in w.items()}, "'_orig_mod.' stands before"),
        (lambda w: {f"module.{k}": t for k, t in w.items()}, "'module.' stands before"),
        (lambda w: {k: t for k, t in w.items() if "layers.1.mlp.up" not in k},
         "model.layers.1.mlp.up_proj.weight is missing"),
        (lambda w: w | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)},
         "model.layers.0.self_attn.q_proj.bias is unknown"),
        (lambda w: {k: t for k, t in w.items() if "lm_head" not in k}, "lm_head.weight is missing"),
    ],
)  # fmt: skip
def test_weights_of_other_names_are_refused(change, message, llama_directory):
    rename(llama_directory, change)
    with pytest.raises(UserError, match=message):
        load_model(str(llama_directory), "cpu", torch.float32)


def test_a_head_that_is_the_embedding_is_not_missed(tmp_path, tokenizer):
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_model(str(tmp_path), "cpu", torch.float32)


# Rows that have something to score.


@pytest.fixture
def small_lm(tokenizer) -> BatchedLM:
    return BatchedLM(HuggingFaceBackend(make_llama()), tokenizer)


def merging_pairs(tokenizer, text: str) -> list[tuple[str, str]]:
    """All cuts of a text that no token ends at, the last of which leave no token of their own."""
    whole = tokenizer.encode(text, add_special_tokens=False)
    cuts = [(text[:i], text[i:]) for i in range(1, len(text)) if not text[i - 1].isspace()]
    ids = [tokenizer.encode(a, add_special_tokens=False) for a, _ in cuts]
    assert any(len(own) >= len(whole) for own in ids)
    return [cut for cut, own in zip(cuts, ids, strict=True) if own != whole[: len(own)]]


def test_a_continuation_that_merges_with_its_context_is_scored(small_lm, tokenizer):
    pairs = merging_pairs(tokenizer, "the argument parser of the option values in default help")
    assert pairs
    with torch.no_grad():
        found = small_lm.loglikelihood(requests("loglikelihood", pairs))
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        ids = [0, *tokenizer.encode(context + continuation, add_special_tokens=False)]
        before = [0, *tokenizer.encode(context, add_special_tokens=False)]
        start = next(i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b)
        of_each = logits_of(small_lm.backend.model, ids).log_softmax(-1)
        expected = sum(float(of_each[i - 1, ids[i]]) for i in range(start, len(ids)))
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert np.isfinite(logprob)
        assert logprob < 0


@pytest.mark.parametrize("pair", [("the", ""), ("", "")])
def test_an_empty_continuation_is_refused(pair, small_lm):
    with pytest.raises(UserError, match="task t, row 0: there is nothing to score"):
        small_lm.loglikelihood(requests("loglikelihood", [pair]))


def test_a_continuation_longer_than_the_context_is_refused(small_lm):
    small_lm.backend.max_length = 12
    with pytest.raises(UserError, match="task t, row 0: its continuation has .* context of 12"):
        small_lm.loglikelihood(requests("loglikelihood", [("the", " argument" * 20)]))


def test_texts_that_are_all_empty_have_no_perplexity(small_lm):
    with pytest.raises(UserError, match="task t: all of its texts are empty"):
        small_lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("",), ("",)]))


# Prompts and answers.


def test_a_prompt_stays_whole_and_the_answer_ends_with_the_context(small_lm, tokenizer):
    """lm-eval's 256 new tokens, and a context of 64."""
    backend = small_lm.backend
    backend.max_length = 64
    prompt = "the parser is not an option of the argument"
    ids = [0, *tokenizer.encode(prompt, add_special_tokens=False)]
    assert 10 < len(ids) < 64
    with torch.no_grad():
        (text,) = small_lm.generate_until(requests("generate_until", [(prompt, {})]))
    new = []
    while len(ids) + len(new) < 65:
        token = int(logits_of(backend.model, ids + new)[-1].argmax())
        if token == 0 or token in backend.end_tokens:
            break
        new.append(token)
    assert text == tokenizer.decode(new)
    assert not small_lm.counts.cropped
    assert small_lm.counts.limited == ({"t": 1} if len(ids) + len(new) == 65 else {})


def test_a_prompt_that_is_too_long_by_itself_keeps_its_end(small_lm):
    small_lm.backend.max_length = 16
    calls = []
    small_lm.engine.prepare()
    model = small_lm.backend.model
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        small_lm.generate_until(requests("generate_until", [("the parser " * 20, {})]))
    assert calls[0].shape == (1, 8)
    assert small_lm.counts.cropped == {"t": 1}


def test_every_end_token_of_a_model_ends_a_text(small_lm, tokenizer, tmp_path):
    prompt = ("the parser is", {"until": [], "max_gen_toks": 8})
    model = small_lm.backend.model
    ids = torch.tensor([[0, *tokenizer.encode(prompt[0], add_special_tokens=False)]])
    plain = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=0, pad_token_id=0)
    model.generation_config = plain
    free = model.generate(ids)[0, ids.shape[1] :].tolist()
    end = next(token for token in free[1:] if token != free[0])
    model.generation_config = GenerationConfig(
        max_new_tokens=8, do_sample=False, eos_token_id=[0, end], pad_token_id=0
    )
    expected = model.generate(ids)[0, ids.shape[1] :].tolist()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, backend, own = load_model(str(tmp_path), "cpu", torch.float32)
    with torch.no_grad():
        (text,) = BatchedLM(backend, own).generate_until(requests("generate_until", [prompt]))
    assert expected[-1] == end
    assert text == tokenizer.decode(expected[:-1])
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [0, end]
    shutil.rmtree(tmp_path)
