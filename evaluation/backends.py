"""One way of calling our `Transformer` and any Hugging Face causal language model.

Shapes: B rows, T new tokens, P positions, V vocabulary.
"""

import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evaluation.model_facts import context_length, end_tokens, smallest_window


class Backend(Protocol):
    """A model whose computed prefixes can be continued."""

    name: str
    """What messages call it."""
    model: nn.Module
    max_length: int
    """Tokens that it can see."""
    vocab_size: int
    smallest_window: int | None
    """The shortest stretch of tokens that a prefix must be longer than to show a mistake."""
    end_tokens: set[int]
    """Ids that end a text, besides those that the tokenizer names."""
    shares_prefix: bool
    """Whether it can continue a computed prefix; `evaluation.probe` finds out what really holds."""
    equal_prefixes: bool
    """Whether only prefixes of one length may be computed together."""
    device: torch.device

    def new_cache(self, n_row: int, max_context: int) -> Any:
        """An empty cache of B rows and up to ``max_context`` tokens."""

    def branch(self, cache: Any, rows: list[int]) -> Any:
        """A cache of its own whose row i continues row ``rows[i]``."""

    def compute(
        self, ids_BT: Tensor, lengths: list[int], positions_BP: Tensor, cache: Any = None
    ) -> Tensor:
        """Logits (B, P, V) in fp32 at positions of the new tokens.

        Args:
            ids_BT: int64, new tokens only, right-padded.
            lengths: real new tokens per row.
            positions_BP: int64, indices into T.
            cache: what the rows follow; extended in place. None: nothing, and nothing is kept.
        """

    def __call__(self, *args: Any) -> Tensor:
        """`compute`, as scoring and generating call it."""

    def whole(self, ids_1T: Tensor) -> Tensor:
        """Logits (1, T, V) in fp32 of one text by the model's plain call, which others equal."""

    def computes_all_logits(self) -> bool:
        """From now on the head sees all positions; False where nothing is left to change."""


class TransformerBackend:
    """Our own `Transformer`, plain, under DDP or sharded by FSDP2."""

    equal_prefixes = False
    smallest_window = None

    def __init__(
        self, model: nn.Module, max_length: int | None = None, end_tokens: set[int] | None = None
    ):
        self.model, self.name = model, "the model"
        self.max_length = max_length or model.config.sequence_len
        self.vocab_size = model.config.vocab_size
        self.end_tokens = end_tokens or set()
        self.shares_prefix = True
        self.device = next(model.parameters()).device

    def new_cache(self, n_row: int, max_context: int) -> Any:
        """See `Backend`."""
        return self.model.new_cache(n_row, max_context)

    def branch(self, cache: Any, rows: list[int]) -> Any:
        """See `Backend`."""
        return cache.select(torch.tensor(rows, device=self.device))

    def compute(self, ids_BT, lengths, positions_BP, cache=None) -> Tensor:
        """See `Backend`."""
        if cache is None:
            return self.model(ids_BT, positions_BP=positions_BP)
        lengths_B = torch.tensor(lengths, device=self.device)
        return self.model(ids_BT, cache=cache, lengths=lengths_B, positions_BP=positions_BP)

    def __call__(self, ids_BT, lengths, positions_BP, cache=None) -> Tensor:
        """See `Backend`."""
        return self.compute(ids_BT, lengths, positions_BP, cache)

    def whole(self, ids_1T: Tensor) -> Tensor:
        """See `Backend`."""
        return self.model(ids_1T)

    def computes_all_logits(self) -> bool:
        """See `Backend`."""
        return False


@dataclass
class HuggingFaceCache:
    """Keys and values with the mask that tells real tokens from padding."""

    states: Any
    """A ``transformers`` cache; slots of padding stay in it."""
    mask: Tensor
    """(B, slots) int64, 1 where a slot holds a real token."""
    lengths: Tensor
    """(B,) int64, real tokens seen."""


class HuggingFaceBackend:
    """Any causal language model of ``transformers``.

    Prefixes are padded on the right, which causal attention needs no mask for; what continues them
    gets a mask and its true position ids. Which models keep to that is found out by
    `evaluation.probe`; what is known beforehand is decided here.
    """

    def __init__(self, model: nn.Module, max_length: int | None = None):
        self.model, self.name = model, type(model).__name__
        self.max_length = max_length or context_length(model)
        self.end_tokens = end_tokens(model)
        self.device = next(model.parameters()).device
        self._accepted = inspect.signature(model.forward).parameters
        self.smallest_window = smallest_window(model)
        kinds = _cache_layers(model)
        # A window counts slots, so padding between a prefix and what follows would move it.
        self.equal_prefixes = self.smallest_window is not None or (
            bool(kinds) and kinds != {"DynamicLayer"}
        )
        self.shares_prefix = (
            kinds is not None
            and kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"}
            and not getattr(model, "_is_stateful", False)
        )
        embedding = model.get_input_embeddings()
        n_embedding = getattr(embedding, "num_embeddings", None)
        self.vocab_size = n_embedding or model.config.get_text_config(decoder=True).vocab_size
        self._positions: Tensor | None = None
        self._gathered = False
        self._head = model.get_output_embeddings()
        if self._head is not None:
            self._head.register_forward_pre_hook(self._gather)

    def _gather(self, module: nn.Module, inputs: tuple) -> tuple | None:
        """Leaves the head only the hidden states at the positions asked for."""
        if self._positions is None or self._head is None:
            return None
        (hidden_BTC,) = inputs
        self._gathered = True
        index = self._positions[..., None].expand(-1, -1, hidden_BTC.shape[-1])
        return (hidden_BTC.gather(1, index),)

    def new_cache(self, n_row: int, max_context: int) -> HuggingFaceCache:
        """See `Backend`."""
        from transformers import DynamicCache

        empty = torch.zeros(n_row, 0, dtype=torch.long, device=self.device)
        states = DynamicCache(config=self.model.config)
        return HuggingFaceCache(states, empty, empty.sum(1))

    def branch(self, cache: HuggingFaceCache, rows: list[int]) -> HuggingFaceCache:
        """See `Backend`."""
        index = torch.tensor(rows, device=self.device)
        # Selecting replaces a layer's tensors, so that copies of the layers leave the old ones be.
        states = copy.copy(cache.states)
        states.layers = [copy.copy(layer) for layer in cache.states.layers]
        states.batch_select_indices(index)
        return replace(cache, states=states, mask=cache.mask[index], lengths=cache.lengths[index])

    def _accepts(self, name: str) -> bool:
        kinds = {parameter.kind for parameter in self._accepted.values()}
        return name in self._accepted or inspect.Parameter.VAR_KEYWORD in kinds

    def compute(self, ids_BT, lengths, positions_BP, cache=None) -> Tensor:
        """See `Backend`."""
        n_token = ids_BT.shape[1]
        arguments: dict[str, Any] = {}
        if self._accepts("use_cache"):
            arguments["use_cache"] = cache is not None
        if cache is not None:
            lengths_B = torch.tensor(lengths, device=self.device)
            slot = torch.arange(n_token, device=self.device)
            real = (slot < lengths_B[:, None]).long()
            first = cache.mask.shape[1] == 0
            cache.mask = torch.cat((cache.mask, real), dim=1)
            # transformers 5.24 has renamed it.
            name = "cache" if "cache" in self._accepted else "past_key_values"
            arguments[name] = cache.states
            if not first:
                arguments["attention_mask"] = cache.mask
                # Padding may lie beyond a learned position table.
                position = cache.lengths[:, None] + slot
                # Models without this argument find positions in the mask, or not at all.
                if "position_ids" in self._accepted:
                    arguments["position_ids"] = position.clamp(max=self.max_length - 1)
            cache.lengths = cache.lengths + lengths_B
        self._positions, self._gathered = positions_BP, False
        try:
            logits = self.model(input_ids=ids_BT, **arguments).logits
        finally:
            self._positions = None
        if not self._gathered:
            index = positions_BP[..., None].expand(-1, -1, logits.shape[-1])
            logits = logits.gather(1, index)
        return logits.float()

    def __call__(self, ids_BT, lengths, positions_BP, cache=None) -> Tensor:
        """See `Backend`."""
        return self.compute(ids_BT, lengths, positions_BP, cache)

    def whole(self, ids_1T: Tensor) -> Tensor:
        """See `Backend`."""
        arguments = {"use_cache": False} if self._accepts("use_cache") else {}
        return self.model(input_ids=ids_1T, **arguments).logits.float()

    def computes_all_logits(self) -> bool:
        """See `Backend`."""
        changed, self._head = self._head is not None, None
        return changed


def _cache_layers(model: nn.Module) -> set[str] | None:
    """The kinds of layers in a model's cache; None where it has no cache of that class."""
    from transformers import DynamicCache

    try:
        return {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    except Exception:  # a configuration of whatever form
        return None
