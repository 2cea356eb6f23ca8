"""What a `transformers` caller passes to the network: honoured, or refused in words.

The one place that knows which arguments there are. Shapes: B batch, T new tokens, C = d_model.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bov_lightning.errors import UserError
from bov_lightning.interop.hf_cache import BoVCache
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.lookup import source_class


class Call(NamedTuple):
    """One call's tokens, padding moved to the right, and what is wanted of them."""

    token_ids: Tensor
    """(B, T), int64."""
    embedded: Tensor | None
    """(B, T, C) in the place of their embedding."""
    order: Tensor | None
    """(B, T): which column of the caller's each of ours is; None: the same."""
    lengths: Tensor | None
    """(B,): real tokens of each row; None: all."""
    starts: Tensor | None
    """(B, T) bool: tokens that start a text of their own."""
    past: BoVCache | None
    continues: bool
    """Whether the cache has a past: nothing then carries a gradient."""

    def as_given(self, x: Tensor) -> Tensor:
        """``x`` (B, T, C) in the order of the caller's columns."""
        if self.order is None:
            return x
        return x.gather(1, self.order.argsort(1)[:, :, None].expand_as(x))


def read_call(
    config: TransformerConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Any,
    inputs_embeds: Tensor | None,
    use_cache: bool | None,
    use_cache_if_possible: bool,
    others: dict[str, Any],
) -> Call:
    """Checks and prepares the arguments that all models take.

    Args:
        config: the network's.
        input_ids: (B, T).
        attention_mask: (B, T), or (B, tokens seen + T) with a cache: 0 is padding, which stands at
            either end of the T columns.
        position_ids: (B or 1, T): count up by one; 0 starts another text (without a cache).
        past_key_values: a `BoVCache`.
        inputs_embeds: (B, T, C), what the embedding gives, beside ``input_ids``, or instead where
            no value source reads token ids.
        use_cache: whether to start a cache; None: ``use_cache_if_possible``.
        use_cache_if_possible: what the configuration says.
        others: whatever else was passed: refused, unless it asks for nothing.

    Raises:
        UserError: something that cannot be honoured.
    """
    token_ids, embedded = _tokens(config, input_ids, inputs_embeds)
    if past_key_values is not None and not isinstance(past_key_values, BoVCache):
        raise UserError(
            f"past_key_values is a {type(past_key_values).__name__}, which has no place for what "
            "this network keeps (prefix tuning passes one too): leave it out, or pass what an "
            "earlier call returned"
        )
    past = past_key_values
    order, lengths = _padding(attention_mask, token_ids, past)
    starts = _starts(position_ids, token_ids, order, lengths)
    _refuse_others(others, token_ids, past, starts)
    if starts is not None and (past is not None or use_cache):
        raise UserError(
            "position_ids start another text in the middle of a row, which a cache cannot "
            "continue: pass use_cache=False"
        )
    if past is None and starts is None:
        wanted = use_cache_if_possible and not _is_traced() if use_cache is None else use_cache
        past = BoVCache() if wanted else None
    if past is not None:
        _check_shift(past, position_ids, order, lengths, len(token_ids))
    if order is not None:
        token_ids = token_ids.gather(1, order)
        if embedded is not None:
            embedded = embedded.gather(1, order[:, :, None].expand_as(embedded))
    continues = past is not None and past.is_initialized
    return Call(token_ids, embedded, order, lengths, starts, past, continues)


def _is_traced() -> bool:
    """Whether a graph is being made, which no check may depend on."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _tokens(
    config: TransformerConfig, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if input_ids is None and inputs_embeds is None:
        raise UserError("neither input_ids nor inputs_embeds: a model needs input_ids")
    if inputs_embeds is not None:
        shape = tuple(inputs_embeds.shape)
        if len(shape) != 3 or shape[2] != config.d_model:
            raise UserError(f"inputs_embeds is {shape}: (batch, time, {config.d_model}) is needed")
    if input_ids is None:
        source = config.value.source
        if source_class(source).reads_token_ids or config.document_start is not None:
            what = f"values come from {source}, which is looked up by token id"
            if config.document_start is not None:
                what = "documents are told apart by a token id"
            raise UserError(
                f"inputs_embeds alone is not enough: {what}; pass input_ids of the same tokens too "
                "(prompt tuning and its like have none, and cannot train this model)"
            )
        # Nothing reads them but what counts tokens.
        input_ids = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.int64)
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise UserError(
            f"input_ids is {tuple(input_ids.shape)} of {input_ids.dtype}: whole numbers of shape "
            "(batch, time) are needed"
        )
    if inputs_embeds is not None and inputs_embeds.shape[:2] != input_ids.shape:
        raise UserError(
            f"inputs_embeds is {tuple(inputs_embeds.shape)} and input_ids "
            f"{tuple(input_ids.shape)}: they are of the same tokens"
        )
    if input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise UserError("no tokens: a text has at least one, such as <|bos|>")
    # On a GPU reading them back would make it wait.
    if input_ids.device.type == "cpu" and not _is_traced():
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise UserError(
                f"token id {low if low < 0 else high} is outside of the vocabulary of "
                f"{config.vocab_size}: resize_token_embeddings makes room for new ones"
            )
    return input_ids.long(), inputs_embeds


def _refuse_others(
    others: dict[str, Any], token_ids: Tensor, past: BoVCache | None, starts: Tensor | None
) -> None:
    """Refuses what is not known, unless it says what holds anyway."""
    for name, value in others.items():
        if value is None or (value is False and name != "is_causal"):
            continue
        if name == "cache_position":
            first = 0 if past is None else past.n_column
            expected = torch.arange(first, first + token_ids.shape[1], device=value.device)
            says_nothing = torch.equal(value.flatten(), expected)
        elif name == "token_type_ids":
            says_nothing = not bool(value.any())
        elif name == "is_causal":
            says_nothing = value
        elif name in ("tokenizer", "assistant_tokenizer"):
            # Generation hands them on to every model.
            says_nothing = True
        elif name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            says_nothing = value.tolist() == _boundaries(token_ids, starts)
        elif name == "seq_idx":
            changes = F.pad(value.diff(dim=1) != 0, (1, 0))
            says_nothing = _boundaries(token_ids, changes) == _boundaries(token_ids, starts)
        else:
            # Room for kernels that take the lengths of texts.
            says_nothing = name in ("max_length_q", "max_length_k") and "cu_seq_lens_q" in others
        if not says_nothing:
            raise UserError(
                f"{name} is nothing that this model takes, or other than position_ids say: "
                "leave it out"
            )


def _boundaries(token_ids: Tensor, starts: Tensor | None) -> list[int]:
    """Where the texts of all rows, one after the other, begin, and where the last one ends."""
    begins = torch.zeros_like(token_ids, dtype=torch.bool) if starts is None else starts.clone()
    begins[:, 0] = True
    return [*begins.flatten().nonzero()[:, 0].tolist(), begins.numel()]


def _padding(
    attention_mask: Tensor | None, token_ids: Tensor, past: BoVCache | None
) -> tuple[Tensor | None, Tensor | None]:
    """(order, lengths) as in `Call`."""
    if attention_mask is None:
        return None, None
    mask, (n_row, n_token) = attention_mask, token_ids.shape
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UserError("attention_mask must be (batch, time): the network is causal")
    n_seen = 0 if past is None else past.n_column
    if mask.shape[0] != n_row or mask.shape[1] not in (n_token, n_seen + n_token):
        raise UserError(
            f"attention_mask is {tuple(mask.shape)}: ({n_row}, {n_seen + n_token}) is needed, "
            "for all tokens so far and these"
        )
    real = mask[:, mask.shape[1] - n_token :].bool()
    if not _is_traced():
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise UserError("attention_mask holds other numbers than 0 (padding) and 1")
        if n_seen and mask.shape[1] > n_token:
            seen = mask[:, :n_seen].sum(1).tolist()
            if seen != past.seen:
                raise UserError(
                    f"attention_mask counts {seen} real tokens before these, but past_key_values "
                    f"has seen {past.seen}: what a cache has seen cannot be hidden afterwards"
                )
        if bool(real.all()):
            return None, None
        n_piece = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
        if bool((n_piece > 1).any()):
            raise UserError(
                f"attention_mask hides tokens in the middle of row {int(n_piece.argmax())}: only "
                "padding at the ends of a text can be left out"
            )
    return (~real).long().argsort(dim=1, stable=True), real.sum(1)


def _starts(
    position_ids: Tensor | None, token_ids: Tensor, order: Tensor | None, lengths: Tensor | None
) -> Tensor | None:
    """``starts`` as in `Call`: None where every row is one text."""
    if position_ids is None:
        return None
    n_row, n_token = token_ids.shape
    if position_ids.ndim != 2 or position_ids.shape[1] != n_token:
        raise UserError(f"position_ids is {tuple(position_ids.shape)}: ({n_row}, {n_token}) fits")
    positions = _in_order(position_ids, order, n_row)
    column = torch.arange(n_token, device=positions.device)
    before = F.pad(positions, (1, 0))[:, :-1]
    jumps = (positions != before + 1) & (column > 0)
    if lengths is not None:
        jumps &= column < lengths[:, None]
    if not _is_traced():
        if not bool(jumps.any()):
            return None
        wrong = jumps & (positions != 0)
        if bool(wrong.any()):
            row, at = wrong.nonzero()[0].tolist()
            raise UserError(
                f"position_ids go from {int(before[row, at])} to {int(positions[row, at])} in row "
                f"{row}: they count up by one, and 0 starts another text"
            )
    return jumps


def _in_order(position_ids: Tensor, order: Tensor | None, n_row: int) -> Tensor:
    if position_ids.shape[0] not in (1, n_row):
        raise UserError(f"position_ids is of {position_ids.shape[0]} rows, input_ids of {n_row}")
    positions = position_ids.expand(n_row, -1)
    return positions if order is None else positions.gather(1, order)


def _check_shift(
    past: BoVCache,
    position_ids: Tensor | None,
    order: Tensor | None,
    lengths: Tensor | None,
    n_row: int,
) -> None:
    """Refuses positions that do not go on where a cache ends.

    Only distances count in this network, so each row may start anywhere.
    """
    if position_ids is None:
        past.shifts = past.shifts or [0] * n_row
        return
    first = _in_order(position_ids, order, n_row)[:, 0].tolist()
    seen = past.seen or [0] * n_row
    new = [1] * n_row if lengths is None else lengths.tolist()
    shifts = [
        position - before if count else 0
        for position, before, count in zip(first, seen, new, strict=False)
    ]
    if past.shifts is None:
        past.shifts = shifts
    for row, (known, shift, count) in enumerate(zip(past.shifts, shifts, new, strict=False)):
        if count and known != shift:
            raise UserError(
                f"position_ids of row {row} start at {first[row]}, but past_key_values goes on at "
                f"{seen[row] + known}"
            )
