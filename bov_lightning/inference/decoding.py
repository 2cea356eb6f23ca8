"""A batch of texts that are continued together, and their text as it comes."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bov_lightning.errors import UserError
from bov_lightning.inference.sampling import Sampling, choose, has_choice
from bov_lightning.model.prefill import prefill
from bov_lightning.model.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
        """One more token of every running row; None for the others.

        Raises:
            UserError: logits that are not finite.
        """
        logits_BV = self._decode() if any(self.new) else self._prefill()
        chosen = zip(has_choice(logits_BV), self.running, strict=True)
        if any(running and not choice for choice, running in chosen):
            raise UserError(
                "the logits of the model are not finite, so that no token can be chosen: its "
                "weights are damaged, or overflow in this --dtype"
            )
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
