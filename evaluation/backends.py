"""One way of calling our `Transformer` and any Hugging Face causal language model.

Shapes: B rows, T new tokens, P positions, V vocabulary.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Backend(Protocol):
    """A model whose computed prefixes can be continued."""

    max_length: int
    """Tokens that it can see."""
    vocab_size: int
    shares_prefix: bool
    """Whether it can continue a computed prefix."""
    equal_prefixes: bool
    """Whether only prefixes of one length may be computed together."""
    device: torch.device

    def new_cache(self, n_row: int, max_context: int) -> Any:
        """An empty cache of B rows and up to ``max_context`` tokens."""

    def branch(self, cache: Any, rows: list[int]) -> Any:
        """A cache of its own whose row i continues row ``rows[i]``."""

    def __call__(
        self, ids_BT: Tensor, lengths: list[int], positions_BP: Tensor, cache: Any = None
    ) -> Tensor:
        """Logits (B, P, V) in fp32 at positions of the new tokens.

        Args:
            ids_BT: int64, new tokens only, right-padded.
            lengths: real new tokens per row.
            positions_BP: int64, indices into T.
            cache: what the rows follow; extended in place. None: nothing, and nothing is kept.
        """


class TransformerBackend:
    """Our own `Transformer`, plain, under DDP or sharded by FSDP2."""

    equal_prefixes = False
    shares_prefix = True

    def __init__(self, model: nn.Module, max_length: int | None = None):
        self.model = model
        self.max_length = max_length or model.config.sequence_len
        self.vocab_size = model.config.vocab_size
        self.device = next(model.parameters()).device

    def new_cache(self, n_row: int, max_context: int) -> Any:
        """See `Backend`."""
        return self.model.new_cache(n_row, max_context)

    def branch(self, cache: Any, rows: list[int]) -> Any:
        """See `Backend`."""
        return cache.select(torch.tensor(rows, device=self.device))

    def __call__(self, ids_BT, lengths, positions_BP, cache=None) -> Tensor:
        """See `Backend`."""
        if cache is None:
            return self.model(ids_BT, positions_BP=positions_BP)
        lengths_B = torch.tensor(lengths, device=self.device)
        return self.model(ids_BT, cache=cache, lengths=lengths_B, positions_BP=positions_BP)


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
    gets a mask and its true position ids.
    """

    def __init__(self, model: nn.Module, max_length: int | None = None):
        from transformers import DynamicCache

        self.model = model
        config = model.config.get_text_config(decoder=True)
        named = (getattr(config, n, None) for n in ("max_position_embeddings", "n_positions"))
        self.max_length = max_length or next((n for n in named if n), 2048)
        self.vocab_size = config.vocab_size
        self.device = next(model.parameters()).device
        layers = DynamicCache(config=model.config).layers
        kinds = {type(layer).__name__ for layer in layers}
        # A window counts slots, so padding between a prefix and what follows would move it.
        self.equal_prefixes = kinds != {"DynamicLayer"} and bool(kinds)
        self.shares_prefix = kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"} and not getattr(
            model, "_is_stateful", False
        )
        self._positions: Tensor | None = None
        self._head = model.get_output_embeddings()
        if self._head is not None:
            self._head.register_forward_pre_hook(self._gather)

    def _gather(self, module: nn.Module, inputs: tuple) -> tuple | None:
        """Leaves the head only the hidden states at the positions asked for."""
        if self._positions is None:
            return None
        (hidden_BTC,) = inputs
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

    def __call__(self, ids_BT, lengths, positions_BP, cache=None) -> Tensor:
        """See `Backend`."""
        n_token = ids_BT.shape[1]
        arguments: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            lengths_B = torch.tensor(lengths, device=self.device)
            slot = torch.arange(n_token, device=self.device)
            real = (slot < lengths_B[:, None]).long()
            first = cache.mask.shape[1] == 0
            cache.mask = torch.cat((cache.mask, real), dim=1)
            arguments["past_key_values"] = cache.states
            if not first:
                arguments["attention_mask"] = cache.mask
                # Padding may lie beyond a learned position table.
                position = cache.lengths[:, None] + slot
                arguments["position_ids"] = position.clamp(max=self.max_length - 1)
            cache.lengths = cache.lengths + lengths_B
        self._positions = positions_BP
        try:
            logits = self.model(input_ids=ids_BT, **arguments).logits
        finally:
            self._positions = None
        if self._head is None:
            index = positions_BP[..., None].expand(-1, -1, logits.shape[-1])
            logits = logits.gather(1, index)
        return logits.float()
