"""Greedy or sampled text for lm-eval's generate_until requests."""

from functools import partial
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance

from bov_lightning.errors import UserError
from bov_lightning.inference.sampling import Sampling, choose, has_choice
from evaluation.engine import Engine, origin

DEFAULT_NEW_TOKENS = 256
SEED = 1234


class Continuation:
    """One text that grows until a stop sequence, the document's end or its limit."""

    def __init__(self, engine: Engine, request: Instance):
        context, options = request.args[0], dict(request.args[1] or {})
        self.engine, self.request = engine, request
        until = options.pop("until", None) or []
        # An empty string is in every text.
        self.until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        limit = int(options.pop("max_gen_toks", options.pop("max_new_tokens", DEFAULT_NEW_TOKENS)))
        if limit < 1:
            raise UserError(f"{origin(request)}: max_gen_toks is {limit}: at least 1")
        ids = np.concatenate([engine.encoder.bos, engine.encoder.encode(context)])
        max_length = engine.backend.max_length
        if len(ids) > max_length:
            # The prompt alone is too long: its end stays, with room for an answer behind it.
            engine.counts.add_cropped(request.task_name)
            ids = ids[-max(1, max_length - min(limit, max_length // 2)) :]
        engine.check_vocabulary(ids, origin(request))
        self.ids = ids
        # The last token is not fed.
        self.limit = min(limit, max_length - len(self.ids) + 1)
        self.is_limited = self.limit < limit
        sampled = options.get("do_sample", False)
        top_p = float(options.get("top_p") or 1)
        self.sampling = Sampling(
            max_new_tokens=self.limit,
            temperature=float(options.get("temperature", 1)) if sampled else 0.0,
            top_k=int(options["top_k"]) if options.get("top_k") else None,
            top_p=top_p if top_p < 1 else None,
        )
        self.tokenizer = engine.tokenizer
        self.end = {engine.tokenizer.eos_token_id, int(engine.encoder.bos[0])}
        self.end |= engine.backend.end_tokens
        self.generated: list[int] = []
        self.finished = False

    def add(self, token: int) -> None:
        """Appends a token, and notices the end."""
        if token in self.end:
            self.finished = True
            return
        self.generated.append(token)
        text = self._decode()
        stopped = any(stop in text for stop in self.until)
        full = len(self.generated) >= self.limit
        if full and not stopped and self.is_limited:
            self.engine.counts.add_limited(self.request.task_name)
        self.finished = stopped or full

    def _decode(self) -> str:
        return self.tokenizer.decode(self.generated, skip_special_tokens=True)

    @property
    def text(self) -> str:
        """What was generated, up to the first stop sequence."""
        text = self._decode()
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
    chosen = has_choice(logits)
    following = []
    for i, text in enumerate(batch):
        token = int(engine.encoder.bos[0])  # a finished row is fed anything
        if not text.finished:
            if not chosen[i]:
                raise UserError(
                    f"{origin(text.request)}: the logits of the model are not finite, so that no "
                    "token can be chosen"
                )
            token = choose(logits[i].cpu(), text.sampling, generator)
            text.add(token)
        grown = np.array([token], dtype=np.int32)
        if cache is not None:
            following.append(grown)
        else:  # a finished row must not outgrow the context
            following.append(new[i] if text.finished else np.concatenate([new[i], grown]))
    new[:] = following
