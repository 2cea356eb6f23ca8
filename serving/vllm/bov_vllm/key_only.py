"""Layers of a bank keep keys alone in vLLM's pages: values are made of rows of the table.

Everything that vLLM must know is its public form of an attention layer: what a page holds, who
builds a step's metadata, who attends. The row numbers of the pages' slots lie beside them, 4 bytes
each, once for all layers that share a page table.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheLayout

from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.kernels import attend_pages_fused, token_spans
from bov_lightning.model.values import BankOfValues
from bov_vllm.key_only_arithmetic import (
    Request,
    Scratch,
    attend_in_pieces,
    attend_pages,
    requests_of,
    write_slots,
    write_values,
)
from bov_vllm.pages import PagedLayer, sliding_window

if TYPE_CHECKING:
    from vllm.config import CacheConfig

VLLM_KERNEL = "vec"
"""vLLM's kernel for every processor; what its pages look like depends on it."""

NAME = "BOV_KEY_ONLY"
"""What vLLM knows the backend by."""


class PageIds:
    """The row numbers of all slots of one page table, (pages, slots) or (pages, slots, R) int32:
    token ids, where values are a token's row of a bank."""

    def __init__(self):
        self.ids: Tensor | None = None

    def beside(self, pages_NKPD: Tensor, each: tuple[int, ...]) -> Tensor:
        """Those of these pages; ``each``: the shape of a slot's numbers."""
        shape = (pages_NKPD.shape[0], pages_NKPD.shape[2], *each)
        if self.ids is None or self.ids.shape != shape:
            self.ids = torch.zeros(shape, dtype=torch.int32, device=pages_NKPD.device)
        return self.ids


@dataclass
class KeyOnlyMetadata:
    """A step's requests, for all key-only layers that share a page table."""

    num_actual_tokens: int
    query_start_loc: Tensor
    """(R + 1,) int32: rows at which the requests' new tokens start."""
    seq_lens: Tensor
    """(R,) int32: tokens of each request, the new ones included."""
    block_table: Tensor
    """(R, M) int32: the pages of each request."""
    slot_mapping: Tensor
    """(new tokens,) int64: where their keys go."""
    page_ids: PageIds
    scratch: Scratch
    ids_written: bool = False
    _requests: list[Request] | None = None
    _spans: dict[int | None, Tensor] = field(default_factory=dict)

    def requests(self, n_slot: int) -> list[Request]:
        """The same on a CPU, where shapes may depend on it."""
        if self._requests is None:
            self._requests = requests_of(
                self.query_start_loc.tolist(), self.seq_lens.tolist(), self.block_table, n_slot
            )
        return self._requests

    def spans(self, window: int | None) -> Tensor:
        """What each new token sees, as `bov_lightning.model.kernels` wants it."""
        if window not in self._spans:
            self._spans[window] = token_spans(
                self.num_actual_tokens, self.query_start_loc, self.seq_lens, window
            )
        return self._spans[window]


class KeyOnlyMetadataBuilder(AttentionMetadataBuilder[KeyOnlyMetadata]):
    """Owns what outlives a step: ids beside the pages, scratch memory."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.page_ids, self.scratch = PageIds(), Scratch()

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common = common_attn_metadata
        return KeyOnlyMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            block_table=common.block_table_tensor[: common.num_reqs],
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
            page_ids=self.page_ids,
            scratch=self.scratch,
        )


class KeyOnlyBackend(AttentionBackend):
    """What vLLM asks of a kind of attention."""

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type["KeyOnlyImpl"]:
        return KeyOnlyImpl

    @staticmethod
    def get_builder_cls() -> type[KeyOnlyMetadataBuilder]:
        return KeyOnlyMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # The keys of one head of a page lie together.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        # The ids beside the pages would stay behind.
        return False


def attend_by_vllm(
    q: Tensor, pages: Tensor, row_ids: Tensor, table: Tensor, request: Request,
    window: int | None, scale: float, out: Tensor, scratch: Scratch,
    row_weights: tuple[float, ...] | None = None,
) -> None:  # fmt: skip
    """`attend_in_pieces` by vLLM's kernel for CPUs, whose pages hold keys (D, P) and values (P, D)
    of each head: those of one layer and request lie in scratch memory meanwhile."""
    _, n_kv_head, head_dim, n_slot = pages.shape
    first_page = request.seen_from(window) // n_slot
    n_page = len(request.pages) - first_page
    n_token = request.n_token - first_page * n_slot
    kept = request.kept.get(window)
    if kept is None:
        ids = row_ids[first_page * n_slot :]
        none_each = (0, 0) * (ids.dim() - 1)
        ids = torch.nn.functional.pad(ids, (*none_each, 0, n_page * n_slot - n_token))
        heads = torch.arange(n_kv_head).int().view(-1, *[1] * ids.dim())
        rows = ids.unflatten(0, (n_page, 1, n_slot)) * n_kv_head + heads
        starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, len(q)], [n_token]))
        plan = ops.cpu_attn_get_scheduler_metadata(
            1, q.shape[1], n_kv_head, head_dim, lengths, q.dtype, starts, True,
            sliding_window(window) or -1, VLLM_KERNEL, envs.VLLM_CPU_ATTN_SPLIT_KV,
        )  # fmt: skip
        table_of_pages = torch.arange(n_page, dtype=torch.int32)[None]
        kept = request.kept[window] = rows.flatten(0, 2), starts, lengths, plan, table_of_pages
    rows, starts, lengths, plan, table_of_pages = kept
    shape = (n_page, n_kv_head, n_slot, head_dim)
    keys, values = (scratch.take(f"vllm {name}", shape, q.dtype) for name in ("keys", "values"))
    as_pages = keys.view(-1, *pages.shape[1:])
    numbers = request.pages[first_page:]
    if pages.dtype == q.dtype:
        torch.index_select(pages, 0, numbers, out=as_pages)
    else:
        # From one 16-bit format to the other torch goes number by number, by fp32 it does not.
        exact = scratch.take("page", pages.shape[1:], torch.float32)
        for place, page in enumerate(numbers.tolist()):
            as_pages[place] = exact.copy_(pages[page])
    by_head = table.view(-1, head_dim)
    write_values(rows, by_head, row_weights, values.view(-1, head_dim), scratch)
    ops.cpu_attention_with_kv_cache(
        q, keys, values, out, starts, lengths, scale, True, None, sliding_window(window) or -1,
        table_of_pages, 0.0, plan, None,
    )  # fmt: skip


def best_for_many(n_slot: int, head_dim: int) -> Callable:
    """vLLM's kernel where it takes such pages: it is a third faster than torch's."""
    return attend_in_pieces if n_slot % 32 or head_dim % 32 else attend_by_vllm


class KeyOnlyImpl(AttentionImpl[KeyOnlyMetadata]):
    """Attends, after it has put the new keys and ids into their slots."""

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
        kv_cache_dtype, *args, **kwargs,
    ):  # fmt: skip
        if kv_cache_dtype != "auto":
            raise ValueError(
                f"kv_cache_dtype {kv_cache_dtype} is not supported where pages hold keys alone: "
                "use kv_cache_dtype=auto"
            )
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale, self.kv_cache_dtype = scale, kv_cache_dtype
        self.window = None if sliding_window is None else sliding_window - 1

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output,
        output_scale=None, output_block_scale=None,
    ):  # fmt: skip
        """``value`` holds the row numbers, (T,) or (T, R)."""
        if attn_metadata is None:
            return output
        step, n_token = attn_metadata, attn_metadata.num_actual_tokens
        page_ids = step.page_ids.beside(kv_cache, value.shape[1:])
        pages = kv_cache
        if not kv_cache.is_cuda:
            # Both are views of the same memory: see `attend_pages`.
            if kv_cache.dtype == torch.bfloat16:
                pages = pages.view(torch.float16)
            pages = pages.view(*kv_cache.shape[:2], self.head_size, -1).mT
        write_slots(
            key[:n_token], None if step.ids_written else value[:n_token], step.slot_mapping,
            pages, page_ids,
        )  # fmt: skip
        step.ids_written = True
        q, table, row_weights = query[:n_token], layer.table, layer.row_weights(value)
        if kv_cache.is_cuda:
            output[:n_token] = attend_pages_fused(
                q, kv_cache, page_ids, table, step.spans(self.window), step.block_table, self.scale,
                row_weights,
            )  # fmt: skip
        else:
            attend_pages(
                q, pages.mT, page_ids, table, step.requests(kv_cache.shape[2]), self.window,
                self.scale, output[:n_token], step.scratch,
                best_for_many(kv_cache.shape[2], self.head_size), row_weights,
            )  # fmt: skip
        return output


class KeyOnly(PagedLayer):
    """Pages of keys alone."""

    def __init__(
        self, bank: BankOfValues, config: TransformerConfig, window: int | None,
        cache_config: "CacheConfig", prefix: str,
    ):  # fmt: skip
        """``bank`` has the rows that values are made of; all else as `PagedLayer`."""
        if NAME not in AttentionBackendEnum.__members__:
            path = f"{KeyOnlyBackend.__module__}.{KeyOnlyBackend.__qualname__}"
            AttentionBackendEnum.register(NAME, path)
        super().__init__(config, window, cache_config, prefix, attn_backend=KeyOnlyBackend)
        # A tuple hides it from PyTorch: its layer values own it.
        self._bank = (bank,)

    @property
    def table(self) -> Tensor:
        """(rows, K*D): the bank's."""
        return self._bank[0].table

    def row_weights(self, row_ids: Tensor) -> tuple[float, ...] | None:
        """What the rows (T,) or (T, R) of values are multiplied by; None: each is one row."""
        return self._bank[0].weights(row_ids[None])

    def attend(self, values, inputs, q_BTHD, k_BTKD, mask):
        q_NHD, k_NKD = q_BTHD[:, 0], k_BTKD[:, 0]
        y_NHD = torch.empty_like(q_NHD)
        # vLLM's own operator, at which it cuts graphs for CUDA: row numbers are in the place of
        # values.
        torch.ops.vllm.unified_attention_with_output(
            q_NHD, k_NKD, inputs.row_ids[:, 0], y_NHD, _encode_layer_name(self.layer_name)
        )
        return values.scaled(y_NHD[:, :, None]), None

    def get_kv_cache_spec(self, vllm_config):
        """What a page holds: no values."""
        return replace(super().get_kv_cache_spec(vllm_config), head_size_v=0)
