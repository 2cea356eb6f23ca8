"""vLLM's engine in this process, and its answers against the network's own forward pass."""

import functools
import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.platforms import current_platform

from bov_lightning.model.transformer import Transformer

TOLERANCE = 1e-4
"""Of log-probabilities in fp32."""

BEST = 5
"""Log-probabilities compared at each step: the network's best."""

BLOCK = 32
"""Tokens of a block."""

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1,
         "prompt_lookup_max": 3}  # fmt: skip


# Once is enough for a process, and a second time it stumbles over what n-gram drafts have imported.
PLATFORM = type(current_platform)
PLATFORM.register_triton_kernel_overrides = staticmethod(
    functools.cache(PLATFORM.register_triton_kernel_overrides)
)


class Engine:
    """An engine, and what it has counted."""

    def __init__(self, llm: LLM):
        self.llm = llm
        self._before = self._totals()

    def _totals(self) -> Counter:
        return Counter({
            metric.name.removeprefix("vllm:"): metric.value
            for metric in self.llm.get_metrics() if hasattr(metric, "value")
        })  # fmt: skip

    def counts(self) -> Counter:
        """What was counted since the engine started: others of this process counted before."""
        totals = self._totals()
        totals.subtract(self._before)
        return totals

    def answer(
        self, prompts: list[list[int]], n_new: int, prompt_logprobs: int | None = None
    ) -> list[RequestOutput]:
        """Greedy continuations of exactly ``n_new`` tokens, with log-probabilities."""
        how = SamplingParams(
            temperature=0, max_tokens=n_new, ignore_eos=True, logprobs=2 * BEST,
            prompt_logprobs=prompt_logprobs,
        )  # fmt: skip
        given = [{"prompt_token_ids": ids} for ids in prompts]
        return self.llm.generate(given, how, use_tqdm=False)

    @property
    def pages(self):
        """vLLM's `KVCacheConfig`."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config


@contextmanager
def engine(export: Path, **how) -> Iterator[Engine]:
    """An engine that serves an export in fp32, eagerly unless told otherwise."""
    how = {
        "dtype": "float32", "block_size": BLOCK, "enforce_eager": True, "max_num_seqs": 16,
        "kv_cache_memory_bytes": 2**26, "skip_tokenizer_init": True, "seed": 0,
        "disable_log_stats": False,
    } | how  # fmt: skip
    llm = LLM(str(export), **how)
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@torch.inference_mode()
def worst_difference(model: Transformer, outputs: list[RequestOutput]) -> float:
    """The largest difference of log-probabilities from the network's; its best token each time.

    Each text is one forward pass, given whole: what follows from a wrong token is not excused.
    """
    worst = 0.0
    for output in outputs:
        (answer,) = output.outputs
        prompt, new = list(output.prompt_token_ids), list(answer.token_ids)
        logits = model(torch.tensor([prompt + new[:-1]]))[0].log_softmax(-1)
        rows = [(len(prompt) - 1 + i, served) for i, served in enumerate(answer.logprobs)]
        if output.prompt_logprobs is not None:
            rows += [(i - 1, served) for i, served in enumerate(output.prompt_logprobs) if i]
        for position, served in rows:
            best = logits[position].topk(BEST)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                found = served[token].logprob if token in served else -torch.inf
                worst = max(worst, abs(found - value))
        expected = logits[len(prompt) - 1 :].argmax(-1).tolist()
        if expected != new:
            worst = float("inf")
    return worst
