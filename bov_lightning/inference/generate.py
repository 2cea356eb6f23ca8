"""Continuing texts: prompts in chunks, one token per row and step after that, text as it comes."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bov_lightning.errors import UserError
from bov_lightning.inference.decoding import Decoding, TextStream
from bov_lightning.inference.graph import StaticSteps, pays_static
from bov_lightning.inference.loading import check_device, end_tokens, load
from bov_lightning.inference.sampling import Sampling
from bov_lightning.model.transformer import Transformer
from bov_lightning.model.values import BankOfValues
from bov_lightning.text import NoTextError, check, decode, lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
    """All prompts of a command: given as text, a whole file, one per line; ``-`` reads stdin.

    Files are UTF-8; blank lines are left out.

    Raises:
        UserError: a file that cannot be read, or is no text; a line that is no prompt.
    """
    found = list(prompts)
    if prompt_file is not None:
        found.append(_read(prompt_file).replace("\r\n", "\n"))
    if prompts_file is not None:
        before = len(found)
        for number, line in enumerate(lines(_read(prompts_file)), 1):
            if line.strip():
                found.append(_prompt(line, f"{prompts_file} line {number}"))
        if len(found) == before:
            raise UserError(f"{prompts_file} holds no prompts")
    return found or [""]


def _read(name: str) -> str:
    try:
        if name != "-":
            return decode(Path(name).read_bytes())
        if sys.stdin is None:
            raise UserError("prompts in - cannot be read: stdin is closed")
        # As files are: the locale may be another, and Python then ends lines at "\r" too.
        binary = getattr(sys.stdin, "buffer", None)
        return check(sys.stdin.read()) if binary is None else decode(binary.read())
    except (OSError, NoTextError) as error:
        raise UserError(f"prompts in {name} cannot be read: {error}") from error


def _prompt(line: str, where: str) -> str:
    """The prompt that a line is, or holds as a JSON object."""
    if not line.startswith("{"):
        return line
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, RecursionError) as error:
        raise UserError(f'{where}: no JSON object with a "prompt"') from error
    if not isinstance(prompt, str):
        raise UserError(f'{where}: its "prompt" is {type(prompt).__name__}, no text')
    try:
        return check(prompt)
    except NoTextError as error:
        raise UserError(f'{where}: its "prompt" holds {error}') from error


def table_bytes(model: Transformer) -> int:
    """Bytes of a model's value tables, wherever they lie."""
    elsewhere = [
        m.host for m in model.modules() if isinstance(m, BankOfValues) and m.host is not None
    ]
    on_device = model.grouped_parameters().get("table", [])
    return sum(table.nbytes for table in (*on_device, *elsewhere))


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
    check_device(device)
    model, tokenizer = load(
        checkpoint, device=device, dtype=getattr(torch, dtype), bank_device=bank_device
    )
    if tokenizer is None:
        raise UserError(f"{checkpoint} has no tokenizer, so it cannot read a prompt")
    start = tokenizer.bos_token_id
    ends = end_tokens(checkpoint, tokenizer)
    encoded = [
        [*([] if start is None else [start]), *tokenizer.encode(text, add_special_tokens=False)]
        for text in prompts
    ]
    statistics = Statistics(table_bytes=table_bytes(model))
    live = len(prompts) == 1 and not as_json
    steps = StaticSteps(model) if pays_static(model.new_cache(1, 1)) else False
    for first in range(0, len(prompts), batch_size):
        batch = slice(first, first + batch_size)
        seeded = Sampling(**{**vars(sampling), "seed": sampling.seed + first})
        decoding = Decoding(model, encoded[batch], seeded, max_context, steps)
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
    start = tokenizer.bos_token_id
    streams = [
        TextStream(tokenizer, decoding.sampling.stop, begins_text=set(prompt) == {start})
        for prompt in decoding.prompts
    ]
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
