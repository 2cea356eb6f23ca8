"""What a ``transformers`` model says of itself, by whichever name its configuration has for it."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from bov_lightning.inference.loading import token_ids

DEFAULT_LENGTH = 2048
"""Context of a model that knows no limit, as in lm-eval's own model class."""
LENGTH_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length",
    "max_seq_length", "seq_length", "seq_len", "context_length", "context_size", "n_ctx",
    "max_target_positions", "max_decoder_position_embeddings", "block_size",
)  # fmt: skip
"""Where configurations keep the context, the more usual names first."""
OTHER_PARTS = re.compile(r"vision|visual|image|audio|speech|encoder\.|(^|[._])rel", re.IGNORECASE)
"""Modules whose positions are not those of the text, and tables of distances."""


def context_length(model: nn.Module) -> int:
    """Tokens that a model can see: what its configuration says, within its tables of positions."""
    config = model.config.get_text_config(decoder=True)
    named = (getattr(config, name, None) for name in LENGTH_NAMES)
    said = next((n for n in named if type(n) is int and n > 0), None)
    limits = (*_position_tables(model), *_fixed_rotations(config.to_dict()))
    return min([said or DEFAULT_LENGTH, *limits])


def _fixed_rotations(config: dict[str, Any]) -> Iterator[int]:
    """Tokens beyond which rotations depend on the longest text of a batch, for its short ones too.

    ``longrope`` and ``dynamic`` change all frequencies where a text exceeds the original context.
    """
    outer = config.get("original_max_position_embeddings")
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name) or {}
        for one in (rope, *(part for part in rope.values() if isinstance(part, dict))):
            kind = one.get("rope_type", one.get("type"))
            limit = one.get("original_max_position_embeddings") or outer
            if kind in ("longrope", "dynamic") and type(limit) is int:
                yield limit


def _position_tables(model: nn.Module) -> Iterator[int]:
    """Positions that learned tables have rows for; some begin with rows of another use."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or OTHER_PARTS.search(name):
            continue
        if re.search(r"pos|wpe", name.rpartition(".")[2]):
            offset = getattr(module, "offset", None)
            if not isinstance(offset, int):
                offset = 0 if module.padding_idx is None else module.padding_idx + 1
            if module.num_embeddings > offset:
                yield module.num_embeddings - offset


def smallest_window(model: nn.Module) -> int | None:
    """The shortest stretch of tokens that attention is cut to; None where nothing says so."""
    config = model.config.get_text_config(decoder=True)
    found = [
        value
        for name, value in config.to_dict().items()
        if re.search(r"window|chunk|local_attention", name)
        and not re.search(r"pattern|layers|use_|speech|vision", name)
        and type(value) is int
        and value > 0
    ]
    return min(found, default=None)


def end_tokens(model: nn.Module) -> set[int]:
    """Ids at which `generate` of ``transformers`` ends a text."""
    return token_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
