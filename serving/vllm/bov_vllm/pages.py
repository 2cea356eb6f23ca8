"""vLLM's pages in the place of `bov_lightning.model.cache`.

vLLM gives the new tokens of all requests as one flat list. To the network each of them is a row of
its own, one token long: what it needs of its past is in the pages (keys and values), or comes along
(the ids before it, whose n-grams values may be made of, and the embedding of the last of them,
which the smear mixes in).

Shapes: N new tokens of all requests, n ids before each, the nearest first, C = d_model, H query
heads, K key-value heads, D head dimension, V = K * D.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.utils.torch_utils import direct_register_custom_op

from bov_lightning.errors import UserError
from bov_lightning.model.attention import attention_scale
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.ngrams import NOTHING, Lookup, look_up
from bov_lightning.model.values import LayerValues, ValueInputs
from bov_vllm.past_ids import read_previous, write_ids

if TYPE_CHECKING:
    from vllm.config import CacheConfig


def sliding_window(window: int | None) -> int | None:
    """A window as vLLM counts it, which counts the token itself too."""
    return None if window is None else window + 1


class PagedLayer(Attention):
    """vLLM's attention layer, which is asked what a `LayerCache` is: to keep and to attend."""

    keeps_ids = False
    """Whether the token ids of its slots are kept too."""
    ids: Tensor | None = None
    """(slots + 1,) int32: the token id in every slot of the pages; the last one is for padding."""

    def __init__(
        self, config: TransformerConfig, window: int | None, cache_config: "CacheConfig",
        prefix: str, **how,
    ):  # fmt: skip
        """``prefix`` is the layer's name, ``how`` what else vLLM's `Attention` takes."""
        super().__init__(
            config.n_head, config.head_dim, attention_scale(config.head_dim), config.n_kv_head,
            cache_config=cache_config, per_layer_sliding_window=sliding_window(window),
            prefix=prefix, **how,
        )  # fmt: skip
        sizes = self.attn_backend.get_supported_head_sizes()
        if sizes and config.head_dim not in sizes:
            raise UserError(
                f"heads of {config.head_dim} channels: {self.attn_backend.get_name()} of vLLM has "
                f"{', '.join(map(str, sizes))}"
            )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Takes the pages, (blocks, K, slots of a block, bytes), and makes room for ids."""
        super().bind_kv_cache(kv_cache)
        if self.keeps_ids:
            n_slot = kv_cache.shape[0] * kv_cache.shape[2]
            self.ids = torch.zeros(n_slot + 1, dtype=torch.int32, device=kv_cache.device)

    def attend(
        self, values: LayerValues, inputs: ValueInputs, q_BTHD: Tensor, k_BTKD: Tensor, mask: None
    ) -> tuple[Tensor, Tensor | None]:
        """Keeps the new tokens; what they attend to, (N, H, 1, D), and their values (N, 1, V)."""
        raise NotImplementedError


class StoredValues(PagedLayer):
    """Pages of keys and values, whatever source these come from."""

    def attend(self, values, inputs, q_BTHD, k_BTKD, mask):
        value = values(inputs)
        v_NV = value.flatten(1).to(q_BTHD.dtype)
        y_NC = self(q_BTHD.flatten(1), k_BTKD.flatten(1), v_NV)
        return y_NC.unflatten(-1, q_BTHD.shape[2:])[:, :, None], value


class Pages:
    """What `Cache` is to the network, for one step of vLLM's."""

    def __init__(
        self, layers: list[PagedLayer], windows: list[int | None], source: Lookup,
        positions_N: Tensor, previous_Nn: Tensor, previous_NC: Tensor,
    ):  # fmt: skip
        """What came before each token: ids, and the last one's normed embedding, zero at a start.

        ``source``: see `bov_lightning.model.ngrams.lookup_source`.
        """
        self.layers, self.positions_N, self.previous_NC = layers, positions_N, previous_NC
        self.source, self.previous_Nn = source, previous_Nn
        # What a token sees is vLLM's business.
        self.masks = dict.fromkeys(windows)

    def begin(self, token_ids_BT: Tensor, lengths: None, starts_BT: None) -> Tensor:
        """The positions of the tokens, (N, 1)."""
        positions_N1 = self.positions_N[:, None]
        before_NR = self.previous_Nn[:, : self.source.reach].flip(1)
        self.tokens = look_up(self.source, token_ids_BT, positions_N1, None, before_NR)
        return positions_N1

    def take_previous(self, x_BTC: Tensor) -> Tensor:
        """The normed embedding before each token, (N, 1, C)."""
        return self.previous_NC[:, None]

    def finish(self) -> None:
        """Nothing: vLLM counts."""


def previous_ids(input_ids: Tensor, positions: Tensor, layer_name: str, n: int) -> Tensor:
    """(N, n) int32: the ids before each token, kept in the slots of ``layer_name``.

    Its layer must see whole texts. Ids are written before any is read: a request may go on from a
    prefix that another one computes in this very step.
    """
    metadata, layer, pages, slots = get_attention_context(layer_name)
    if metadata is None or slots is None or layer.ids is None:
        # vLLM tries out how much memory a step takes.
        return _like_previous_ids(input_ids, positions, layer_name, n).fill_(NOTHING)
    write_ids(layer.ids, slots[: len(input_ids)], input_ids)
    return read_previous(
        layer.ids, positions, metadata.query_start_loc, metadata.block_table, pages.shape[2], n
    )


def _like_previous_ids(input_ids: Tensor, positions: Tensor, layer_name: str, n: int) -> Tensor:
    return input_ids.new_empty((len(input_ids), n), dtype=torch.int32)


direct_register_custom_op(
    op_name="bov_previous_ids", op_func=previous_ids, fake_impl=_like_previous_ids
)
