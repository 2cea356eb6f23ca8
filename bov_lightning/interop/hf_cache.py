"""The network's cache in the place of a `transformers` cache.

Shapes: B batch, T new tokens, C = d_model.
"""

import torch
import transformers
from torch import Tensor

from bov_lightning.errors import UserError
from bov_lightning.model.cache import Cache
from bov_lightning.model.prefill import PREFILL_CHUNK
from bov_lightning.model.transformer import Transformer


class BoVCache(transformers.Cache):
    """`Cache` in the place of a `transformers` cache; it makes room for whatever comes.

    What it has seen stays: it can be continued, copied and reordered, but not cut.
    """

    def __init__(self, max_context: int | None = None):
        """``max_context``: tokens to set room aside for at once; None: those of the first call."""
        super().__init__(layers=[])
        self.max_context = max_context
        self.past: Cache | None = None
        self.n_column = 0
        """Columns of input_ids seen, padding included."""
        self.shifts: list[int] | None = None
        """By how much position_ids differ from the number of real tokens before, by row."""

    def feed(
        self, model: Transformer, token_ids: Tensor, lengths: Tensor | None,
        embedded: Tensor | None, states: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """Takes new tokens (B, T) and gives `Transformer.stream` of them, (B, T, C).

        Gradients reach what a cache without a past is fed; what continues one has none.
        """
        n_token = token_ids.shape[1]
        trains = self.past is None and torch.is_grad_enabled()
        self._make_room(model, *token_ids.shape)
        lengths = None if lengths is None else lengths.cpu()
        size = n_token if trains else PREFILL_CHUNK
        pieces, states_of_pieces = [], []
        with torch.set_grad_enabled(trains):
            for first in range(0, n_token, size):
                part = slice(first, first + size)
                ids, found = token_ids[:, part], None if states is None else []
                new = None if lengths is None else (lengths - first).clamp(0, ids.shape[1])
                whole = new is None or bool((new == ids.shape[1]).all())
                pieces.append(
                    model.stream(
                        ids, cache=self.past, lengths=None if whole else new, states=found,
                        embedded_BTC=None if embedded is None else embedded[:, part],
                    )
                )  # fmt: skip
                states_of_pieces.append(found)
        self.n_column += n_token
        if states is not None:
            states += [torch.cat(parts, dim=1) for parts in zip(*states_of_pieces, strict=True)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _make_room(self, model: Transformer, n_row: int, n_token: int) -> None:
        if self.past is None:
            self.past = model.new_cache(n_row, max(self.max_context or 0, n_token))
        elif self.past.config != model.config:
            raise UserError("past_key_values were made by a model of another shape")
        needed = max(self.seen) + n_token
        if needed > self.past.max_context:
            rows = range(self.past.batch_size)
            self.past = self.past.select(rows, max(needed, 2 * self.past.max_context))

    @property
    def seen(self) -> list[int]:
        """Real tokens that each row has seen; nothing where there is no row yet."""
        return [] if self.past is None else list(self.past._lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input_ids that were seen."""
        return self.n_column

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no end."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        """Rows; -1 before there are any."""
        return -1 if self.past is None else self.past.batch_size

    @property
    def is_compileable(self) -> bool:
        """No: it grows by Python's counting."""
        return False

    @property
    def is_croppable(self) -> bool:
        """No: see `crop`."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether anything was seen."""
        return self.past is not None

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return 0 if self.past is None else self.past.nbytes

    def __len__(self):
        return 0 if self.past is None else len(self.past.layers)

    def reset(self) -> None:
        """Forgets everything."""
        self.past, self.n_column, self.shifts = None, 0, None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps those rows, in that order."""
        if self.past is None:
            return
        rows = torch.as_tensor(indices).tolist()
        self.past = self.past.select(rows)
        self.shifts = None if self.shifts is None else [self.shifts[row] for row in rows]

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        n_row = max(self.batch_size, 0)
        self.batch_select_indices([row for row in range(n_row) for _ in range(repeats)])

    def update(self, *args, **kwargs):
        """Refused: the network fills it, by tokens and not by layers."""
        raise NotImplementedError("a BoV cache is filled by the model, not by keys and values")

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a window's ring has already forgotten what cropping would bring back."""
        raise NotImplementedError("a BoV cache cannot be cropped: assisted generation needs that")
