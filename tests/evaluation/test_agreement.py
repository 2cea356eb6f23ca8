"""Rows as lm-eval's own model scores them, whatever the tokenizer starts a text with."""

import logging

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from bov_lightning.errors import UserError
from evaluation.backends import HuggingFaceBackend
from evaluation.lm import BatchedLM

pytestmark = pytest.mark.slow

WORDS = [
    f"def read_{i}(self, path): once upon a time there was a naive parser\n" for i in range(99)
]
CONTEXTS = ("once upon a time", "def read_3(self, path)", "He wrote f", "naïve 你好", "a ", "x")
CONTINUATIONS = (" there was a parser", " naive", "rom the", " x y", "\n return", "你")


def byte_level() -> tuple[Tokenizer, str]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet,
        show_progress=False,
    ))  # fmt: skip
    return tokenizer, "<|endoftext|>"


def byte_fallback() -> tuple[Tokenizer, str]:
    """Spaces are ▁, one of which starts every text; what is not in the vocabulary is bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False
    ))  # fmt: skip
    return tokenizer, "<s>"


SHAPE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "gpt2": (byte_level, GPT2LMHeadModel, lambda **ids: GPT2Config(
        n_embd=48, n_layer=2, n_head=4, n_positions=256, **ids)),
    "llama": (byte_fallback, LlamaForCausalLM, lambda **ids: LlamaConfig(
        **SHAPE, intermediate_size=64, max_position_embeddings=256, **ids)),
    "opt": (byte_level, OPTForCausalLM, lambda **ids: OPTConfig(
        **SHAPE, ffn_dim=64, word_embed_proj_dim=48, max_position_embeddings=256, **ids)),
}  # fmt: skip


def build(kind: str, adds_start: bool):
    make_tokenizer, model_class, make_config = MODELS[kind]
    plain, start = make_tokenizer()
    if adds_start:
        plain.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, plain.token_to_id(start))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=start, eos_token=start)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.bos_token_id)
    model = model_class(make_config(vocab_size=len(tokenizer), **ids)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, tokenizer


@pytest.mark.parametrize("adds_start", [False, True], ids=["without BOS", "with BOS"])
@pytest.mark.parametrize("kind", MODELS)
def test_rows_are_those_of_lm_evals_own_model(kind, adds_start):
    pytest.importorskip("accelerate", reason="lm-eval's own model needs it")
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = build(kind, adds_start)
    ours = BatchedLM(HuggingFaceBackend(model), tokenizer, budget=100)
    logging.disable(logging.WARNING)
    try:
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    finally:
        logging.disable(logging.NOTSET)
    # Ours starts every text with BOS; theirs where the tokenizer does, or the text itself.
    start = "" if adds_start else tokenizer.bos_token
    # Where a continuation merges with its context, theirs feeds tokens of no text.
    pairs = [
        (a, b)
        for a in CONTEXTS
        for b in CONTINUATIONS
        if tokenizer.tokenize(a + b)[: len(tokenizer.tokenize(a.rstrip()))]
        == tokenizer.tokenize(a.rstrip())
    ]
    assert len(pairs) > 25

    def scored(before: str) -> list[Instance]:
        return [
            Instance("loglikelihood", {}, (before + a, b), 0, ("t", i, 1))
            for i, (a, b) in enumerate(pairs)
        ]

    found = ours.loglikelihood(scored(""))
    expected = theirs.loglikelihood(scored(start), disable_tqdm=True)
    for (logprob, greedy), (their_logprob, their_greedy) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(their_logprob, abs=1e-4)
        assert greedy == bool(their_greedy)

    def continued(before: str) -> list[Instance]:
        options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
        return [
            Instance("generate_until", {}, (before + text, dict(options)), 0, ("t", i, 1))
            for i, text in enumerate(CONTEXTS)
        ]

    assert ours.generate_until(continued("")) == theirs.generate_until(
        continued(start), disable_tqdm=True
    )


def test_contexts_are_cropped_to_as_many_tokens_as_theirs():
    from lm_eval.models.huggingface import HFLM

    pytest.importorskip("accelerate", reason="lm-eval's own model needs it")
    model, tokenizer = build("gpt2", True)
    backend = HuggingFaceBackend(model, max_length=16)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", max_length=16)
    text = WORDS[0] + WORDS[1]
    requests = [
        Instance("loglikelihood", {}, (text[:n], " naive"), 0, ("t", n, 1)) for n in range(8, 60, 3)
    ]
    found = BatchedLM(backend, tokenizer).loglikelihood(requests)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [a for a, _ in found] == pytest.approx([b for b, _ in expected], abs=1e-4)
    long = [Instance("loglikelihood", {}, ("x", " naive" * 30), 0, ("t", 0, 1))]
    with pytest.raises(UserError, match="task t, row 0: its continuation has"):
        BatchedLM(backend, tokenizer).loglikelihood(long)
