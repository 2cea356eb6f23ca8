"""Greedy or sampled text for lm-eval's generate_until requests."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from evaluation.ranks import EvaluationInterruptedError

if TYPE_CHECKING:
    from evaluation.lm import BatchedLM

DEFAULT_NEW_TOKENS = 256
SEED = 1234


class Continuation:
    """One text that grows until a stop sequence, the document's end or its limit."""

    def __init__(self, lm: "BatchedLM", request: Instance):
        context, options = request.args[0], dict(request.args[1] or {})
        until = options.pop("until", None) or []
        self.until = [until] if isinstance(until, str) else list(until)
        limit = options.pop("max_gen_toks", options.pop("max_new_tokens", DEFAULT_NEW_TOKENS))
        ids = np.concatenate([lm.encoder.bos, lm.encoder.encode(context)])
        room = max(1, lm.backend.max_length - int(limit))
        if len(ids) > room:
            lm.counts.add_cropped(request.task_name)
        self.ids = ids[-room:]
        self.limit = min(int(limit), lm.backend.max_length - len(self.ids) + 1)
        sampled = options.get("do_sample", False) and float(options.get("temperature", 1)) > 0
        self.temperature = float(options.get("temperature", 1)) if sampled else 0.0
        self.top_k, self.top_p = options.get("top_k"), options.get("top_p")
        self.tokenizer = lm.tokenizer
        self.end = {lm.tokenizer.eos_token_id, int(lm.encoder.bos[0])}
        self.generated: list[int] = []
        self.finished = False

    def choose(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """The next token."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        logits = logits_V / self.temperature
        if self.top_k:
            kept = logits.topk(min(int(self.top_k), len(logits))).values[-1]
            logits = logits.masked_fill(logits < kept, -torch.inf)
        if self.top_p and float(self.top_p) < 1:
            ordered, order = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits[order[before > float(self.top_p)]] = -torch.inf
        return int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator))

    def add(self, token: int) -> None:
        """Appends a token, and notices the end."""
        if token in self.end:
            self.finished = True
            return
        self.generated.append(token)
        text = self.tokenizer.decode(self.generated)
        stopped = any(stop in text for stop in self.until)
        self.finished = stopped or len(self.generated) >= self.limit

    @property
    def text(self) -> str:
        """What was generated, up to the first stop sequence."""
        text = self.tokenizer.decode(self.generated)
        ends = [text.index(stop) for stop in self.until if stop in text]
        return text[: min(ends)] if ends else text


def generate(lm: "BatchedLM", requests: list[Instance]) -> list[str]:
    """The texts of all requests, on every rank; ranks share them and step together."""
    own = list(range(lm.ranks.rank, len(requests), lm.ranks.size))
    texts = lm.ranks.together(lambda: {i: Continuation(lm, requests[i]) for i in own})
    order = sorted(own, key=lambda i: -len(texts[i].ids))
    batches: list[list[Continuation]] = []
    for i in order:
        width = len(batches[-1][0].ids) if batches else 0
        uneven = lm.backend.equal_prefixes and width != len(texts[i].ids)
        if not batches or uneven or (len(batches[-1]) + 1) * width > lm.budget:
            batches.append([])
        batches[-1].append(texts[i])
    finished = 0
    for n in range(int(lm.ranks.maximum([len(batches)])[0])):
        batch = batches[n] if n < len(batches) else []
        _generate_batch(lm, batch)
        finished += len(batch)
        lm.progress(finished, len(own))
    results: dict[int, str] = {}
    for part in lm.ranks.gather({i: text.text for i, text in texts.items()}):
        results.update(part)
    return [results[i] for i in range(len(requests))]


def _generate_batch(lm: "BatchedLM", batch: list[Continuation]) -> None:
    generator = torch.Generator().manual_seed(SEED)
    cache: Any = None
    new = [text.ids for text in batch]
    if batch and lm.backend.shares_prefix:
        # A finished row is fed on, beyond its own limit.
        room = max(len(text.ids) for text in batch) + max(text.limit for text in batch)
        cache = lm.backend.new_cache(len(batch), room)
    while True:
        error = None
        try:
            if all(text.finished for text in batch):
                lm._idle()
            else:
                new = _step(lm, batch, new, cache, generator)
        except Exception as caught:
            error = caught
        running = any(not text.finished for text in batch)
        stop = error is None and lm.should_stop()
        flags = lm.ranks.maximum([float(error is not None), float(stop), float(running)])
        if flags[0]:
            lm.ranks.agree(error)
        if flags[1]:
            raise EvaluationInterruptedError("stopped while generating")
        if not flags[2]:
            return


def _step(
    lm: "BatchedLM", batch: list[Continuation], new: list[np.ndarray], cache: Any, generator
) -> list[np.ndarray]:
    """One forward over the new tokens; the next ones of every row."""
    lengths = [len(ids) for ids in new]
    padded = np.zeros((len(new), max(lengths)), dtype=np.int64)
    for i, ids in enumerate(new):
        padded[i, : len(ids)] = ids
    positions = lm._tensor(np.array(lengths)[:, None] - 1)
    logits = lm.backend(lm._tensor(padded), lengths, positions, cache)[:, 0]
    following = []
    for i, text in enumerate(batch):
        token = int(lm.encoder.bos[0])  # a finished row is fed anything
        if not text.finished:
            token = text.choose(logits[i], generator)
            text.add(token)
        grown = np.array([token], dtype=np.int32)
        following.append(grown if cache is not None else np.concatenate([new[i], grown]))
    return following
