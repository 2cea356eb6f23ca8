"""Continuing texts: prompts in chunks, one token per row and step after that, text as it comes."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bov_lightning.checkpoint.directory import load
from bov_lightning.errors import UserError
from bov_lightning.model.cache import prefill
from bov_lightning.model.transformer import Transformer
from bov_lightning.model.values import BankOfValues

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a text ends."""

    max_new_tokens: int = 100
    """Tokens to add at most."""
    temperature: float = 0.8
    """Divides the logits; 0: always the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest only; None: all."""
    top_p: float | None = None
    """Choose among the likeliest that together have this probability; None: all."""
    seed: int = 0
    """Seed of the first text; the next one's is one more."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these."""

    def __post_init__(self):
        no_choice = self.top_k is not None and self.top_k < 1
        if self.max_new_tokens < 1 or self.temperature < 0 or no_choice:
            raise UserError("--max-new-tokens and --top-k are at least 1, --temperature at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}: above 0, at most 1")
        if "" in self.stop:
            raise UserError("--stop is empty: give the text to stop at")


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of one row, from its fp32 logits on the CPU."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    if sampling.top_k is not None:
        kept = logits_V.topk(min(sampling.top_k, len(logits_V)))
        logits_V = torch.full_like(logits_V, -torch.inf).scatter(0, kept.indices, kept.values)
    probability = torch.softmax(logits_V / sampling.temperature, dim=-1)
    if sampling.top_p is not None:
        ordered, index = probability.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= sampling.top_p
        probability = torch.zeros_like(probability).scatter(
            0, index, ordered.masked_fill(beyond, 0)
        )
    return int(torch.multinomial(probability, 1, generator=generator))


class Decoding:
    """A batch of texts that are continued together; rows end one by one.

    Args:
        model: in eval mode.
        prompts: token ids of each row, at least one.
        sampling: how tokens are chosen.
        max_context: tokens of prompt and continuation that a row may hold.

    Raises:
        UserError: a prompt that is empty or longer than ``max_context``.
    """

    def __init__(
        self, model: Transformer, prompts: list[list[int]], sampling: Sampling,
        max_context: int | None = None,
    ):  # fmt: skip
        self.model, self.prompts, self.sampling = model, prompts, sampling
        self.max_context = max_context or model.config.max_context
        longest = max(map(len, prompts), default=0)
        if not prompts or not all(prompts):
            raise UserError("a prompt is empty: it needs at least one token")
        if longest > self.max_context:
            raise UserError(
                f"the prompt has {longest} tokens, but max_context is {self.max_context}: shorten "
                "it or raise --max-context"
            )
        room = min(self.max_context, longest + sampling.max_new_tokens)
        self.cache = model.new_cache(len(prompts), room)
        self.new: list[list[int]] = [[] for _ in prompts]
        self.running = [True] * len(prompts)
        self._generators = [
            torch.Generator().manual_seed(sampling.seed + row) for row in range(len(prompts))
        ]

    def end(self, row: int) -> None:
        """Ends a text."""
        self.running[row] = False

    @torch.inference_mode()
    def step(self) -> list[int | None]:
        """One more token of every running row; None for the others."""
        logits_BV = self._decode() if any(self.new) else self._prefill()
        if self.sampling.temperature == 0:
            likeliest = logits_BV.argmax(-1).tolist()
        else:
            logits_BV = logits_BV.cpu()
        tokens: list[int | None] = [None] * len(self.prompts)
        for row in range(len(tokens)):
            if not self.running[row]:
                continue
            if self.sampling.temperature == 0:
                token = likeliest[row]
            else:
                token = choose(logits_BV[row], self.sampling, self._generators[row])
            tokens[row] = token
            self.new[row].append(token)
            n_token = len(self.prompts[row]) + len(self.new[row])
            full = n_token > self.max_context or len(self.new[row]) == self.sampling.max_new_tokens
            self.running[row] = not full
        return tokens

    def _prefill(self) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in self.prompts])
        ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
        for row, prompt in enumerate(self.prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        return prefill(self.model, self.cache, ids.to(self.cache.device), lengths)

    def _decode(self) -> Tensor:
        ids = torch.tensor([[new[-1]] for new in self.new], device=self.cache.device)
        lengths = None if all(self.running) else torch.tensor(self.running, dtype=torch.int64)
        return self.model(ids, cache=self.cache, lengths=lengths)[:, -1]


class TextStream:
    """The text of a continuation, token by token, up to the first stop string."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stop: tuple[str, ...] = ()):
        from tokenizers.decoders import DecodeStream

        # A character may need several tokens: the stream waits until its bytes are complete.
        self._stream, self._tokenizer = DecodeStream(), tokenizer.backend_tokenizer
        self._stop, self._held = stop, ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown after one more token; what may become a stop string is held back."""
        self._held += self._stream.step(self._tokenizer, token) or ""
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self._held, self.stopped = self._held[: min(found)], True
            return self.flush()
        held = max(
            (
                n
                for stop in self._stop
                for n in range(1, len(stop))
                if self._held.endswith(stop[:n])
            ),
            default=0,
        )
        cut = len(self._held) - held
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back; the text ends here."""
        shown, self._held = self._held, ""
        return shown


@dataclass
class Statistics:
    """What decoding cost, summed over batches."""

    n_prompt: int = 0
    n_new: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    n_decoded: int = 0
    cache_bytes: int = 0
    table_bytes: int = 0

    def __str__(self):
        rate = self.n_decoded / self.decode_seconds if self.decode_seconds else 0.0
        return (
            f"{self.n_prompt} prompt tokens, {self.n_new} new; first token after "
            f"{self.prefill_seconds:.3f} s, then {rate:.1f} tokens/s; cache "
            f"{self.cache_bytes / 2**20:.2f} MiB, value tables {self.table_bytes / 2**20:.2f} MiB"
        )


def read_prompts(
    prompts: list[str], prompt_file: str | None, prompts_file: str | None
) -> list[str]:
    """All prompts of a command: given as text, a whole file, one per line; ``-`` reads stdin."""

    def read(name: str) -> str:
        try:
            if name == "-":
                return sys.stdin.read()
            return Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompts in {name} cannot be read: {error}") from error

    found = list(prompts)
    if prompt_file is not None:
        found.append(read(prompt_file))
    if prompts_file is not None:
        for number, line in enumerate(read(prompts_file).splitlines(), 1):
            try:
                found.append(json.loads(line)["prompt"] if line.startswith("{") else line)
            except (ValueError, KeyError) as error:
                raise UserError(
                    f'{prompts_file} line {number}: no JSON object with a "prompt"'
                ) from error
        if not found:
            raise UserError(f"{prompts_file} holds no prompts")
    return found or [""]


def table_bytes(model: Transformer) -> int:
    """Bytes of a model's value tables, wherever they lie."""
    banks = [module for module in model.modules() if isinstance(module, BankOfValues)]
    return sum((bank.table if bank.host is None else bank.host).nbytes for bank in banks)


def _check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no usable GPU; use --device cpu")


def generate(
    checkpoint: str, prompts: list[str], sampling: Sampling, *, batch_size: int = 8,
    max_context: int | None = None, device: str = "cpu", dtype: str = "float32",
    as_json: bool = False, bank_device: str | None = None,
) -> None:  # fmt: skip
    """Prints every prompt with its continuation, up to the end of the document or a stop string.

    A single text appears as it is sampled, several one after the other as their batch is done; the
    cost goes to stderr.
    """
    if batch_size < 1 or (max_context is not None and max_context < 1):
        raise UserError("--batch-size and --max-context are at least 1")
    _check_device(device)
    model, tokenizer = load(
        checkpoint, device=device, dtype=getattr(torch, dtype), bank_device=bank_device
    )
    if tokenizer is None:
        raise UserError(f"{checkpoint} has no tokenizer, so it cannot read a prompt")
    start = tokenizer.bos_token_id
    ends = {id_ for id_ in (start, tokenizer.eos_token_id) if id_ is not None}
    encoded = [
        [*([] if start is None else [start]), *tokenizer.encode(text, add_special_tokens=False)]
        for text in prompts
    ]
    statistics = Statistics(table_bytes=table_bytes(model))
    live = len(prompts) == 1 and not as_json
    for first in range(0, len(prompts), batch_size):
        batch = slice(first, first + batch_size)
        seeded = Sampling(**{**vars(sampling), "seed": sampling.seed + first})
        decoding = Decoding(model, encoded[batch], seeded, max_context)
        if live:
            print(prompts[0], end="", flush=True)
        texts = _run(decoding, tokenizer, ends, statistics, live)
        for prompt, text, new in zip(prompts[batch], texts, decoding.new, strict=True):
            if as_json:
                n_token = len(new) - (new[-1] in ends)
                print(json.dumps({"prompt": prompt, "text": text, "tokens": n_token}))
            elif not live:
                print(f"{prompt}{text}\n---")
    if live:
        print()
    sys.stdout.flush()
    print(statistics, file=sys.stderr)


def _run(
    decoding: Decoding, tokenizer: "PreTrainedTokenizerFast", ends: set[int],
    statistics: Statistics, live: bool,
) -> list[str]:  # fmt: skip
    """Decodes to the end; returns the continuations."""
    streams = [TextStream(tokenizer, decoding.sampling.stop) for _ in decoding.prompts]
    texts = [""] * len(streams)
    started, n_step = time.perf_counter(), 0
    while any(decoding.running):
        running = list(decoding.running)
        for row, token in enumerate(decoding.step()):
            if token is None:
                continue
            statistics.n_new += 1
            if token in ends:
                decoding.end(row)
                shown = streams[row].flush()
            else:
                shown = streams[row].push(token)
                if streams[row].stopped:
                    decoding.end(row)
                elif not decoding.running[row]:
                    shown += streams[row].flush()
            texts[row] += shown
            if live:
                print(shown, end="", flush=True)
        now = time.perf_counter()
        if n_step == 0:
            statistics.prefill_seconds += now - started
        else:
            statistics.decode_seconds += now - started
            statistics.n_decoded += sum(running)
        started, n_step = now, n_step + 1
    statistics.n_prompt += sum(map(len, decoding.prompts))
    statistics.cache_bytes = max(statistics.cache_bytes, decoding.cache.nbytes)
    return texts
