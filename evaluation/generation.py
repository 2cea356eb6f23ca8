"""Greedy or sampled text for lm-eval's generate_until requests."""

from functools import partial
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance

from bov_lightning.inference.sampling import Sampling, choose
from evaluation.engine import Engine

DEFAULT_NEW_TOKENS = 256
SEED = 1234


class Continuation:
    """One text that grows until a stop sequence, the document's end or its limit."""

    def __init__(self, engine: Engine, request: Instance):
        context, options = request.args[0], dict(request.args[1] or {})
        until = options.pop("until", None) or []
        self.until = [until] if isinstance(until, str) else list(until)
        limit = options.pop("max_gen_toks", options.pop("max_new_tokens", DEFAULT_NEW_TOKENS))
        ids = np.concatenate([engine.encoder.bos, engine.encoder.encode(context)])
        room = max(1, engine.backend.max_length - int(limit))
        if len(ids) > room:
            engine.counts.add_cropped(request.task_name)
        self.ids = ids[-room:]
        self.limit = min(int(limit), engine.backend.max_length - len(self.ids) + 1)
        sampled = options.get("do_sample", False)
        top_p = float(options.get("top_p") or 1)
        self.sampling = Sampling(
            max_new_tokens=max(1, self.limit),
            temperature=float(options.get("temperature", 1)) if sampled else 0.0,
            top_k=int(options["top_k"]) if options.get("top_k") else None,
            top_p=top_p if top_p < 1 else None,
        )
        self.tokenizer = engine.tokenizer
        self.end = {engine.tokenizer.eos_token_id, int(engine.encoder.bos[0])}
        self.generated: list[int] = []
        self.finished = False

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


def generate(engine: Engine, requests: list[Instance]) -> list[str]:
    """The texts of all requests, on every rank; ranks share them and step together."""
    own = list(range(engine.ranks.rank, len(requests), engine.ranks.size))
    texts = engine.ranks.together(lambda: {i: Continuation(engine, requests[i]) for i in own})
    order = sorted(own, key=lambda i: -len(texts[i].ids))
    batches: list[list[Continuation]] = []
    for i in order:
        width = len(batches[-1][0].ids) if batches else 0
        uneven = engine.backend.equal_prefixes and width != len(texts[i].ids)
        if not batches or uneven or (len(batches[-1]) + 1) * width > engine.budget:
            batches.append([])
        batches[-1].append(texts[i])
    finished = 0
    for n in range(int(engine.ranks.maximum([len(batches)])[0])):
        batch = batches[n] if n < len(batches) else []
        _generate_batch(engine, batch)
        finished += len(batch)
        engine.progress(finished, len(own))
    results: dict[int, str] = {}
    for part in engine.ranks.gather({i: text.text for i, text in texts.items()}):
        results.update(part)
    return [results[i] for i in range(len(requests))]


def _generate_batch(engine: Engine, batch: list[Continuation]) -> None:
    generator = torch.Generator().manual_seed(SEED)
    cache: Any = None
    new = [text.ids for text in batch]
    if batch and engine.backend.shares_prefix:
        # A finished row is fed on, beyond its own limit.
        room = max(len(text.ids) for text in batch) + max(text.limit for text in batch)
        cache = engine.backend.new_cache(len(batch), room)
    while True:
        call = partial(_step, engine, batch, new, cache, generator)
        if all(text.finished for text in batch):
            call = engine.idle
        if not engine.in_lockstep(
            call, lambda: "stopped while generating",
            lambda: any(not text.finished for text in batch),
        ):  # fmt: skip
            return


def _step(
    engine: Engine, batch: list[Continuation], new: list[np.ndarray], cache: Any, generator
) -> None:
    """One forward over the new tokens, which gives way to the next ones of every row."""
    lengths = [len(ids) for ids in new]
    padded = np.zeros((len(new), max(lengths)), dtype=np.int64)
    for i, ids in enumerate(new):
        padded[i, : len(ids)] = ids
    positions = engine.tensor(np.array(lengths)[:, None] - 1)
    logits = engine.backend(engine.tensor(padded), lengths, positions, cache)[:, 0]
    following = []
    for i, text in enumerate(batch):
        token = int(engine.encoder.bos[0])  # a finished row is fed anything
        if not text.finished:
            token = choose(logits[i].cpu(), text.sampling, generator)
            text.add(token)
        grown = np.array([token], dtype=np.int32)
        following.append(grown if cache is not None else np.concatenate([new[i], grown]))
    new[:] = following
