"""What decoding keeps of the past: keys, values where they have context, numbers of table rows.

Every row of a batch has its own history, so rows may differ in length. A window's layers keep only
what their window still sees, in a ring: position p lies in slot p modulo the ring's length.

Shapes: B batch, T new tokens, S tokens that the new ones attend to, K key-value heads, D head
dimension, R table rows per token.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.ngrams import (
    NOTHING,
    Tokens,
    look_up,
    lookup_source,
    rows_per_token,
    text_positions,
)
from bov_lightning.model.offload import BankRows, HostTable, Slots, moved

if TYPE_CHECKING:
    from torch import nn


ROW_IDS, TOKEN_IDS, STARTS = "row_ids", "token_ids", "starts"
"""Numbers of every token so far, in the order of the text: rows of value tables, ids, and whether
it begins a document."""


def on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Those numbers, (N,) int64; equal ones, as most are, are not even copied."""
    if len(set(numbers)) == 1:
        return torch.full((len(numbers),), numbers[0], dtype=torch.int64, device=device)
    return moved(torch.tensor(numbers, dtype=torch.int64), device)


class Step:
    """One call's new tokens: how many each row gets, and where they stand."""

    def __init__(self, before: list[int], n_token: int, lengths: list[int], device: torch.device):
        self.n_token, self.device = n_token, device
        self.before, self.lengths = before, lengths
        self.after = [old + new for old, new in zip(before, lengths, strict=True)]
        self.uniform = len(set(before)) == 1 and set(lengths) == {n_token}
        rows = before[:1] if self.uniform else before
        self.before_B1 = on_device(rows, device)[:, None]
        self.positions_BT = self.before_B1 + torch.arange(n_token, device=device)
        """(1, T) where all rows stand at the same place."""

    @cached_property
    def length_column(self) -> Tensor:
        """(B, 1): new tokens of each row."""
        return on_device(self.lengths, self.device)[:, None]

    def last_of(self, before: Tensor, new: Tensor) -> Tensor:
        """The last n of what each row has by now, padding left out: (B, n, ...).

        Args:
            before: (B, n, ...): the last n before this step.
            new: (B, T, ...): what the step's tokens bring.
        """
        n = before.shape[1]
        if self.uniform:
            new = torch.cat((before, new), dim=1) if self.n_token < n else new
            return new[:, new.shape[1] - n :]
        index = self.length_column + torch.arange(n, device=self.device)
        index = index.view(*index.shape, *[1] * (new.dim() - 2)).expand(-1, -1, *new.shape[2:])
        return torch.cat((before, new), dim=1).gather(1, index)


class Span:
    """Where the past that a window sees lies, and how a step's new tokens join it."""

    def __init__(self, window: int | None, max_context: int):
        self.reach = max_context if window is None else window
        self.capacity = min(self.reach + 1, max_context)

    def begin(self, step: Step, numbers: dict[str, Tensor]) -> None:
        """Lays out one step: what will be read and in which order.

        ``numbers`` are those that the cache keeps, (B, max_context) or (B, max_context, R).
        """
        self.step, self._numbers = step, numbers
        self._numbers_of_keys: dict[str, Tensor] = {}
        start, end = max(step.before), max(step.after)
        self.wraps = end > self.capacity
        # A ring forgets old keys that the first of several new tokens still see: these attend to
        # the old ones and the new ones side by side. Without a past they are all there is, and what
        # was not kept yet carries gradients.
        self.joins = start == 0 or (step.n_token > 1 and self.wraps)
        self.n_read = min(start if self.joins else end, self.capacity)
        for name in ("key_positions", "mask"):
            self.__dict__.pop(name, None)

    @cached_property
    def key_positions(self) -> Tensor:
        """(1 or B, S): where in the text the keys stand; negative: a slot that holds nothing."""
        slots_BS = self._positions_of_slots()
        if not self.joins:
            return slots_BS
        n_row = max(len(slots_BS), len(self.step.positions_BT))
        both = (slots_BS.expand(n_row, -1), self.step.positions_BT.expand(n_row, -1))
        return torch.cat(both, dim=1)

    def _positions_of_slots(self) -> Tensor:
        """(1 or B, n_read): what the slots that are read hold; negative: nothing yet."""
        slot = torch.arange(self.n_read, device=self.step.device)[None]
        if not self.wraps:
            return slot
        known = self.step.before if self.joins else self.step.after
        last = on_device(known[:1] if self.step.uniform else known, slot.device) - 1
        return last[:, None] - (last[:, None] - slot) % self.capacity

    @cached_property
    def mask(self) -> Tensor | None:
        """(1 or B, 1, T, S) bool; None: one new token that sees all keys, or plain causal."""
        step, starts = self.step, self._numbers.get(STARTS)
        sees_all = step.n_token == 1 and step.uniform
        causal = self.joins and self.n_read == 0 and step.n_token <= self.reach + 1
        if (sees_all or causal) and starts is None:
            return None
        key_BTS = self.key_positions[:, None]
        distance = step.positions_BT[:, :, None] - key_BTS
        mask = (key_BTS >= 0) & (distance >= 0) & (distance <= self.reach)
        if starts is not None:
            document = starts.cumsum(1)
            query = self._take(document, step.positions_BT)[:, :, None]
            mask = mask & (query == self._take(document, self.key_positions)[:, None])
        return mask[:, None]

    @staticmethod
    def _take(kept: Tensor, positions: Tensor) -> Tensor:
        """``kept`` (B, max_context) or (B, max_context, R) at those positions of every row."""
        positions = positions.clamp(0, kept.shape[1] - 1).expand(len(kept), -1)
        if kept.dim() == 3:
            positions = positions[..., None].expand(-1, -1, kept.shape[2])
        return kept.gather(1, positions)

    def numbers(self, name: str) -> Tensor:
        """(B, S) or (B, S, R): the cache's numbers of that name in the order of the keys."""
        if name not in self._numbers_of_keys:
            kept = self._numbers[name]
            in_order = not (self.wraps or self.joins)
            self._numbers_of_keys[name] = (
                kept[:, : self.n_read] if in_order else self._take(kept, self.key_positions)
            )
        return self._numbers_of_keys[name]

    def write(self, kept_BKSD: Tensor, x_BTKD: Tensor) -> None:
        """Puts what the step brings into its slots."""
        step, capacity = self.step, self.capacity
        if not step.uniform:
            token, length = torch.arange(step.n_token), torch.tensor(step.lengths)[:, None]
            due = (token < length) & (token >= length - capacity)
            rows, tokens = moved(due.nonzero(), step.device).unbind(1)
            slots = (step.before_B1[rows, 0] + tokens) % capacity
            kept_BKSD[rows, :, slots] = x_BTKD[rows, tokens].to(kept_BKSD.dtype)
            return
        x_BKTD = x_BTKD.transpose(1, 2)
        n_kept = min(step.n_token, capacity)
        first = (step.after[0] - n_kept) % capacity
        if first + n_kept <= capacity:
            kept_BKSD[:, :, first : first + n_kept] = x_BKTD[:, :, -n_kept:]
        else:
            slots = (first + torch.arange(n_kept, device=step.device)) % capacity
            kept_BKSD.index_copy_(2, slots, x_BKTD[:, :, -n_kept:].to(kept_BKSD.dtype))

    def read(self, kept_BKSD: Tensor) -> Tensor:
        """What the slots hold."""
        return kept_BKSD[:, :, : self.n_read]


class Store:
    """Keys or values of one span, (B, K, capacity, D)."""

    def __init__(self, span: Span, kept_BKSD: Tensor):
        self.span, self.kept = span, kept_BKSD
        self._step: Step | None = None

    def extend(self, x_BTKD: Tensor) -> Tensor:
        """Takes the new tokens' share and gives what they attend to, (B, K, S, D).

        Layers that share a store all call this; the first one's call counts.
        """
        if self._step is not self.span.step:
            self._step = self.span.step
            if self.span.joins:
                new = x_BTKD.transpose(1, 2).to(self.kept.dtype)
                old = self.span.read(self.kept)
                self._joined = torch.cat((old, new), dim=2) if old.shape[2] else new
            self.span.write(self.kept, x_BTKD.detach())
        return self._joined if self.span.joins else self.span.read(self.kept)

    def release(self) -> None:
        """Forgets what only one step needs."""
        self._joined = None


class LayerCache:
    """One layer's past."""

    def __init__(self, cache: "Cache", window: int | None):
        self.cache, self.span = cache, cache.span(window)
        self.keys = cache.new_store(self.span)
        self.values: Store | None = None

    def keep_values(self) -> None:
        """Sets room aside for this layer's own values."""
        self.values = self.cache.new_store(self.span)

    def keep_values_of(self, layer: int) -> None:
        """Sets room aside for that layer's values in this layer's window, once per window."""
        self.values = self.cache.values_of(layer, self.span)

    def keep_row_ids(self) -> None:
        """Sets room aside for what `ValueSource.row_ids` gives, once for all layers."""
        self.cache.keep_row_ids()

    @property
    def row_ids(self) -> Tensor:
        """(B, S) or (B, S, R), int64, in the order of the keys."""
        return self.span.numbers(ROW_IDS)

    def keep_token_ids(self) -> None:
        """Sets room aside for the token ids, once for all layers."""
        self.cache.keep_numbers(TOKEN_IDS, torch.int64)

    @property
    def token_ids(self) -> Tensor:
        """(B, S), int64, in the order of the keys."""
        return self.span.numbers(TOKEN_IDS)

    def keep_rows(self, table: HostTable) -> None:
        """Fetches the rows of `row_ids` from a table outside of the device's memory."""
        self.cache.keep_rows(table)

    def rows(self, table: HostTable) -> tuple[Tensor, Tensor]:
        """The slots of `row_ids`, and the rows by slot."""
        return self.cache.slots.on_device[self.row_ids], self.cache.rows[table].wait()

    def attend(
        self, values: "nn.Module", inputs: tuple, q_BTHD: Tensor, k_BTKD: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Keeps the new keys; attention (B, H, T, D) to everything kept, and the new values.

        ``values`` is the layer's `LayerValues`, ``inputs`` the `ValueInputs` of the new tokens.
        """
        k_BKSD = None if values.keeps_keys else self.keys.extend(k_BTKD)
        return values.attend_past(inputs, q_BTHD.transpose(1, 2), k_BKSD, mask, self)


class Cache:
    """The past of a batch of texts, to be passed to `Transformer.forward` with each new piece.

    Made by `Transformer.new_cache`. ``lengths`` (B,) int64 counts the tokens that each row has
    seen.
    """

    def __init__(
        self, config: TransformerConfig, blocks: "nn.ModuleList", batch_size: int,
        max_context: int, dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        """Sets all room aside; every block says through its values what it needs."""
        if batch_size < 1 or max_context < 1:
            raise UserError(
                f"a cache of {batch_size} rows and {max_context} tokens: at least 1 of both"
            )
        self.config, self._blocks = config, blocks
        self.batch_size, self.max_context = batch_size, max_context
        self.dtype, self.device = dtype, device
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._lengths = [0] * batch_size
        self._spans: dict[int | None, Span] = {}
        self.stores: list[Store] = []
        self._values_of: dict[tuple[int, Span], Store] = {}
        self.rows: dict[HostTable, BankRows] = {}
        self.slots: Slots | None = None
        self._whole = self.span(None)
        self._source = lookup_source(config, blocks)
        self._numbers: dict[str, Tensor] = {}
        self._count_B1: Tensor | None = None
        if config.document_start is not None:
            self.keep_numbers(STARTS, torch.bool)
            self._count_B1 = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        shape = (batch_size, self._source.reach)
        self.previous_ids_BR = torch.full(shape, NOTHING, dtype=torch.int64, device=device)
        """The last ids, as many as the values of the next token may depend on."""
        self.previous_B1C = torch.zeros(batch_size, 1, config.d_model, dtype=dtype, device=device)
        """The last token's normed embedding, which the smear mixes into the next; zero at first."""
        self.layers: list[LayerCache] = []
        for block in blocks:
            layer = LayerCache(self, block.window)
            self.layers.append(layer)
            block.attention.value.reserve(layer)

    def span(self, window: int | None) -> Span:
        """The span of that window, shared by its layers."""
        return self._spans.setdefault(window, Span(window, self.max_context))

    def new_store(self, span: Span) -> Store:
        """Room for one key or value vector per kept token."""
        shape = (self.batch_size, self.config.n_kv_head, span.capacity, self.config.head_dim)
        self.stores.append(Store(span, torch.zeros(shape, dtype=self.dtype, device=self.device)))
        return self.stores[-1]

    def values_of(self, layer: int, span: Span) -> Store:
        """A layer's values within ``span``: its own store where its window is the same."""
        own = self.layers[layer]
        if own.span is span:
            return own.values
        if (layer, span) not in self._values_of:
            self._values_of[layer, span] = self.new_store(span)
        return self._values_of[layer, span]

    def keep_numbers(self, name: str, dtype: torch.dtype, each: tuple[int, ...] = ()) -> None:
        """Sets room aside for numbers of that name, (B, max_context, *each); once."""
        if name not in self._numbers:
            shape = (self.batch_size, self.max_context, *each)
            self._numbers[name] = torch.zeros(shape, dtype=dtype, device=self.device)

    def keep_row_ids(self) -> None:
        """Sets room aside for the rows that values are made of, as many as each token has."""
        self.keep_numbers(ROW_IDS, torch.int64, rows_per_token(self._source, self.device))

    def keep_rows(self, table: HostTable) -> None:
        """Keeps the rows of seen tokens on the device; once per table."""
        if self.slots is None:
            self.slots = Slots(table.n_row, self.device)
        if table not in self.rows:
            self.rows[table] = BankRows(table, self.dtype, self.device)

    def begin(
        self, token_ids_BT: Tensor, lengths: Tensor | None, starts_BT: Tensor | None
    ) -> Tensor:
        """Starts a step; returns the positions of the new tokens, (1 or B, T).

        ``starts_BT`` is True at tokens that begin a document; None: there are none.

        Raises:
            UserError: another batch size, no tokens, more than ``max_context`` of them, ids beyond
                the vocabulary, lengths that do not fit.
        """
        n_row, n_token = token_ids_BT.shape
        if n_row != self.batch_size:
            raise UserError(
                f"the cache holds {self.batch_size} rows, the batch {n_row}: make a cache for it"
            )
        if n_token == 0:
            raise UserError("no tokens: a text has at least one, such as <|bos|>")
        new = [n_token] * n_row if lengths is None else lengths.tolist()
        if len(new) != n_row or not all(0 <= n <= n_token for n in new):
            raise UserError(f"lengths {new} do not fit {n_row} rows of {n_token} tokens")
        step = Step(self._lengths, n_token, new, self.device)
        if max(step.after) > self.max_context:
            raise UserError(
                f"{max(step.after)} tokens do not fit into a context of {self.max_context}: give "
                "less text or a larger max_context"
            )
        # Ids that were sampled are right, and reading them back would make a GPU wait.
        if n_token > 1 or token_ids_BT.device.type == "cpu":
            self.check_ids(token_ids_BT)
        self._lay_out(step, token_ids_BT, starts_BT)
        return step.positions_BT

    def _lay_out(self, step: Step, token_ids_BT: Tensor, starts_BT: Tensor | None) -> None:
        """What a step reads, and where what it brings goes."""
        self._step = step
        self.tokens = self._look_up(token_ids_BT, starts_BT)
        self._fetch_rows()
        for span in self._spans.values():
            span.begin(step, self._numbers)
        for name, new in self._new_numbers(starts_BT):
            kept_B1SR = self._numbers[name].view(self.batch_size, 1, self.max_context, -1)
            self._whole.write(kept_B1SR, new.reshape(*token_ids_BT.shape, 1, -1))

    def _look_up(self, token_ids_BT: Tensor, starts_BT: Tensor | None) -> Tokens:
        """The new tokens with what values read of them; remembers what the next ones need."""
        step, before_BR, positions = self._step, self.previous_ids_BR, self._step.positions_BT
        if starts_BT is not None:
            positions = text_positions(positions, starts_BT, self._count_B1[:, 0])
            self._count_B1 = step.last_of(self._count_B1, positions + 1)
        if self._source.reach:
            self.previous_ids_BR = step.last_of(before_BR, token_ids_BT).clone()
        start = self.config.document_start
        return look_up(self._source, token_ids_BT, positions, starts_BT, before_BR, start)

    def _new_numbers(self, starts_BT: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """(name, (B, T, ...)) of the numbers that are kept."""
        found = {ROW_IDS: self.tokens.row_ids, TOKEN_IDS: self.tokens.ids, STARTS: starts_BT}
        return ((name, found[name]) for name in self._numbers)

    def _fetch_rows(self) -> None:
        """Begins to fetch the rows of the new tokens from tables that lie elsewhere."""
        if self.slots is not None:
            new_ids = self.slots.admit(self.tokens.row_ids)
            for rows in self.rows.values():
                rows.prefetch(new_ids)

    def check_ids(self, token_ids_BT: Tensor) -> None:
        """Refuses ids beyond the vocabulary; where they are on a GPU, this waits for it."""
        low, high = torch.stack(token_ids_BT.aminmax()).tolist()
        if low < 0 or high >= self.config.vocab_size:
            raise UserError(
                f"token id {low if low < 0 else high} is outside of the vocabulary of "
                f"{self.config.vocab_size}"
            )

    @property
    def masks(self) -> dict[int | None, Tensor | None]:
        """The step's mask of each window, (1 or B, 1, T, S)."""
        return {window: span.mask for window, span in self._spans.items()}

    def take_previous(self, x_BTC: Tensor) -> Tensor:
        """The normed embedding before each row's new tokens; keeps that of the last of them."""
        previous_B1C = self.previous_B1C.to(x_BTC.dtype)
        last_B1C = self._step.last_of(previous_B1C, x_BTC.detach())
        self.previous_B1C = last_B1C.to(self.dtype, copy=True)
        return previous_B1C

    def finish(self) -> None:
        """Counts the step's tokens."""
        self._lengths = self._step.after
        self.lengths = on_device(self._lengths, self.device)
        for store in self.stores:
            store.release()

    def clear(self) -> None:
        """Forgets all texts; what a step sees of its room follows from the lengths."""
        self._lengths = [0] * self.batch_size
        self.lengths = torch.zeros_like(self.lengths)
        self.previous_B1C = torch.zeros_like(self.previous_B1C)
        self.previous_ids_BR = torch.full_like(self.previous_ids_BR, NOTHING)
        if self._count_B1 is not None:
            self._count_B1 = torch.zeros_like(self._count_B1)

    def pretend(self, token_ids_BT: Tensor) -> None:
        """Counts tokens as seen without computing anything for them, for benchmarks."""
        n_row, n_token = token_ids_BT.shape
        start = self.config.document_start
        starts_BT = None if start is None else token_ids_BT == start
        self._step = Step([0] * n_row, n_token, [n_token] * n_row, self.device)
        self.tokens = self._look_up(token_ids_BT, starts_BT)
        self._fetch_rows()
        for name, new in self._new_numbers(starts_BT):
            self._numbers[name][:, :n_token] = new
        self.finish()

    def select(self, rows: "Tensor | list[int]", max_context: int | None = None) -> "Cache":
        """An independent cache whose row i continues this one's row ``rows[i]``.

        ``max_context``: room that it has, at least this one's; as much if not given.
        """
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
        if not all(0 <= row < self.batch_size for row in index.tolist()):
            raise UserError(f"rows {index.tolist()} are not rows of a cache of {self.batch_size}")
        room = max_context or self.max_context
        chosen = Cache(self.config, self._blocks, len(index), room, self.dtype, self.device)
        chosen._lengths = [self._lengths[row] for row in index.tolist()]
        chosen.lengths, chosen.previous_B1C = self.lengths[index], self.previous_B1C[index]
        used = max(self._lengths)
        for source, copy in zip(self.stores, chosen.stores, strict=True):
            copy.kept[:, :, :used] = source.kept[index, :, :used]
        chosen.previous_ids_BR = self.previous_ids_BR[index]
        if self._count_B1 is not None:
            chosen._count_B1 = self._count_B1[index]
        for name, kept in self._numbers.items():
            chosen._numbers[name][:, :used] = kept[index, :used]
        if self.slots is not None:
            chosen.slots = self.slots.copy()
            chosen.rows = {table: rows.copy() for table, rows in self.rows.items()}
        return chosen

    def __deepcopy__(self, memo: dict) -> "Cache":
        """An independent cache of the same model, whose weights are not copied."""
        memo[id(self)] = copied = self.select(range(self.batch_size))
        return copied

    @property
    def nbytes_per_layer(self) -> list[int]:
        """Bytes of keys and values by layer; a store that layers share counts for the first."""
        seen: set[int] = set()
        sizes = []
        for layer in self.layers:
            stores = {id(s): s for s in (layer.keys, layer.values) if s and id(s) not in seen}
            seen |= set(stores)
            sizes.append(sum(store.kept.nbytes for store in stores.values()))
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept: numbers of rows, what of the last tokens the next one needs,
        and fetched rows included."""
        last = (self.previous_B1C, self.previous_ids_BR, self.lengths, self._count_B1)
        tensors = [*self._numbers.values(), *(x for x in last if x is not None)]
        rows = sum(rows.nbytes for rows in self.rows.values())
        slots = 0 if self.slots is None else self.slots.on_device.nbytes
        shared = sum(x.nbytes for x in tensors) + rows + slots
        return sum(self.nbytes_per_layer) + shared
