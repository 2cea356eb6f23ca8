"""A batch of texts that are continued together, and their text as it comes."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bov_lightning.errors import UserError
from bov_lightning.inference.graph import StaticStep, StaticSteps, pays_static
from bov_lightning.inference.sampling import Sampling, choose, has_choice, likeliest
from bov_lightning.model.offload import moved
from bov_lightning.model.prefill import prefill
from bov_lightning.model.transformer import Transformer
from data_modules.vocabulary import BYTE, REPLACEMENT, Following

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Decoding:
    """A batch of texts that are continued together; rows end one by one.

    Args:
        model: in eval mode.
        prompts: token ids of each row, at least one.
        sampling: how tokens are chosen.
        max_context: tokens of prompt and continuation that a row may hold.
        static: whether a `StaticStep` computes every token but the first; None: on CUDA, where
            it can. Those of one batch after another, `StaticSteps`, are captured once; the
            decoding before must have come to its end.

    Raises:
        UserError: a prompt that is empty or longer than ``max_context``.
    """

    def __init__(
        self, model: Transformer, prompts: list[list[int]], sampling: Sampling,
        max_context: int | None = None, static: bool | StaticSteps | None = None,
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
        # What the host needs to see of the logits.
        self._then = likeliest if sampling.temperature == 0 else None
        self._static: StaticStep | None = None
        if isinstance(static, StaticSteps):
            self._static = static.take(len(prompts), room, self._then)
            self.cache = self._static.cache
        else:
            self.cache = model.new_cache(len(prompts), room)
            if pays_static(self.cache) if static is None else static:
                self._static = StaticStep(model, self.cache, self._then)
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
        found = self._decode() if any(self.new) else self._seen(self._prefill())
        # All that a step brings back: here, and nowhere else, decoding waits for a GPU.
        found = found.cpu()
        greedy = self.sampling.temperature == 0
        can_choose, tokens_B = found.tolist() if greedy else (has_choice(found), None)
        chosen = zip(can_choose, self.running, strict=True)
        if any(running and not choice for choice, running in chosen):
            raise UserError(
                "the logits of the model are not finite, so that no token can be chosen: its "
                "weights are damaged, or overflow in this --dtype"
            )
        tokens: list[int | None] = [None] * len(self.prompts)
        for row in range(len(tokens)):
            if not self.running[row]:
                continue
            if greedy:
                token = tokens_B[row]
            else:
                token = choose(found[row], self.sampling, self._generators[row])
            tokens[row] = token
            self.new[row].append(token)
            n_token = len(self.prompts[row]) + len(self.new[row])
            full = n_token > self.max_context or len(self.new[row]) == self.sampling.max_new_tokens
            self.running[row] = not full
        return tokens

    def _seen(self, logits_BV: Tensor) -> Tensor:
        return logits_BV if self._then is None else self._then(logits_BV)

    def _prefill(self) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in self.prompts])
        ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
        for row, prompt in enumerate(self.prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        return prefill(self.model, self.cache, ids.to(self.cache.device), lengths)

    def _decode(self) -> Tensor:
        ids = torch.tensor([[new[-1]] for new in self.new])
        if self._static is not None:
            return self._static(ids, self.running)
        lengths = None if all(self.running) else torch.tensor(self.running, dtype=torch.int64)
        ids = moved(ids, self.cache.device)
        return self._seen(self.model(ids, cache=self.cache, lengths=lengths)[:, -1])


class TextStream:
    """The text of a continuation, token by token, up to the first stop string.

    The pieces, behind the prompt, are what all ids decode to, but for an unfinished last character.

    Args:
        tokenizer: a ``transformers`` fast tokenizer.
        stop: strings that end the text.
        begins_text: whether no text stands before the continuation.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", stop: tuple[str, ...] = (),
        begins_text: bool = False,
    ):  # fmt: skip
        self._text, self._tokenizer = Following(tokenizer), tokenizer
        # The last token that was shown, and those since: all that their text depends on.
        self._ids = [] if begins_text else list(self._text.before)
        self._n_shown = len(self._text.decode(self._ids))
        self._stop, self._held = stop, ""
        self.stopped = False

    def _decode(self, token: int) -> str:
        """The text that one more token completes."""
        self._ids.append(token)
        # Bytes of characters without a token become text together, all that follow one another.
        if self._is_byte(token):
            return ""
        whole = self._text.decode(self._ids)
        if whole.endswith(REPLACEMENT):
            return ""
        new = whole[self._n_shown :]
        self._ids = [token]
        self._n_shown = len(self._text.decode(self._ids))
        return new

    def _is_byte(self, token: int) -> bool:
        name = self._tokenizer.convert_ids_to_tokens(token)
        return bool(BYTE.fullmatch(name or "")) and self._text.decode([token]) != name

    def push(self, token: int) -> str:
        """What can be shown after one more token; what may become a stop string is held back."""
        self._held += self._decode(token)
        return self._show()

    def _show(self) -> str:
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
            return shown
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
        """What was held back, without a last character that is not whole; the text ends here."""
        if self.stopped:
            return ""
        self._held += self._text.decode(self._ids)[self._n_shown :].rstrip(REPLACEMENT)
        self._ids, self._n_shown = [], 0
        shown = self._show()
        shown, self._held = shown + self._held, ""
        return shown
