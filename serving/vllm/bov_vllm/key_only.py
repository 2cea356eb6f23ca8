"""Layers of a bank keep keys alone in vLLM's pages: values are rows of the table.

Everything that vLLM must know is its public form of an attention layer: what a page holds, who
builds a step's metadata, who attends. The token ids of the pages' slots lie beside them, 4 bytes a
slot, once for all layers that share a page table.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheLayout

from bov_lightning.model.attention import attention_scale
from bov_lightning.model.kernels import attend_pages_fused, token_spans
from bov_vllm.key_only_arithmetic import (
    Request,
    Scratch,
    attend_pages,
    requests_of,
    write_slots,
)

NAME = "BOV_KEY_ONLY"
"""What vLLM knows the backend by."""


class PageIds:
    """The token ids of all slots of one page table, (pages, slots) int32."""

    def __init__(self):
        self.ids: Tensor | None = None

    def beside(self, pages_NKPD: Tensor) -> Tensor:
        """Those of these pages."""
        shape = (pages_NKPD.shape[0], pages_NKPD.shape[2])
        if self.ids is None or self.ids.shape != shape:
            self.ids = torch.zeros(shape, dtype=torch.int32, device=pages_NKPD.device)
        return self.ids


@dataclass
class KeyOnlyMetadata:
    """A step's requests, for all key-only layers that share a page table."""

    n_token: int
    query_start: Tensor
    """(R + 1,) int32: rows at which the requests' new tokens start."""
    n_past: Tensor
    """(R,) int32: tokens of each request, the new ones included."""
    page_table: Tensor
    """(R, M) int32."""
    slots: Tensor
    """(n_token,) int64: where the new tokens' keys go."""
    page_ids: PageIds
    scratch: Scratch
    ids_written: bool = False
    _requests: list[Request] | None = None
    _spans: dict[int | None, Tensor] = field(default_factory=dict)

    def requests(self, n_slot: int) -> list[Request]:
        """The same on a CPU, where shapes may depend on it."""
        if self._requests is None:
            self._requests = requests_of(
                self.query_start.tolist(), self.n_past.tolist(), self.page_table, n_slot
            )
        return self._requests

    def spans(self, window: int | None) -> Tensor:
        """What each new token sees, as `bov_lightning.model.kernels` wants it."""
        if window not in self._spans:
            spans = token_spans(self.n_token, self.query_start, self.n_past, window)
            self._spans[window] = spans
        return self._spans[window]


class KeyOnlyMetadataBuilder(AttentionMetadataBuilder[KeyOnlyMetadata]):
    """Owns what outlives a step: ids beside the pages, scratch memory."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.page_ids, self.scratch = PageIds(), Scratch()

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common = common_attn_metadata
        return KeyOnlyMetadata(
            n_token=common.num_actual_tokens,
            query_start=common.query_start_loc[: common.num_reqs + 1],
            n_past=common.seq_lens[: common.num_reqs],
            page_table=common.block_table_tensor[: common.num_reqs],
            slots=common.slot_mapping[: common.num_actual_tokens],
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
        """``value`` holds the token ids, (T,)."""
        if attn_metadata is None:
            return output
        step, n_token = attn_metadata, attn_metadata.n_token
        page_ids = step.page_ids.beside(kv_cache)
        write_slots(
            key[:n_token], None if step.ids_written else value[:n_token], step.slots,
            kv_cache, page_ids,
        )  # fmt: skip
        step.ids_written = True
        q, table = query[:n_token], layer.table
        if kv_cache.is_cuda:
            output[:n_token] = attend_pages_fused(
                q, kv_cache, page_ids, table, step.spans(self.window), step.page_table, self.scale
            )
        else:
            attend_pages(
                q, kv_cache, page_ids, table, step.requests(kv_cache.shape[2]), self.window,
                self.scale, output[:n_token], step.scratch,
            )  # fmt: skip
        return output


class KeyOnlyAttention(Attention):
    """An attention layer whose pages hold keys alone."""

    def __init__(
        self, bank: nn.Module, num_heads: int, head_size: int, num_kv_heads: int,
        window: int | None, cache_config, prefix: str,
    ):  # fmt: skip
        """``bank`` has the table (token ids, K*D); ``window`` as in `Block`."""
        if NAME not in AttentionBackendEnum.__members__:
            path = f"{KeyOnlyBackend.__module__}.{KeyOnlyBackend.__qualname__}"
            AttentionBackendEnum.register(NAME, path)
        super().__init__(
            num_heads, head_size, attention_scale(head_size), num_kv_heads,
            cache_config=cache_config,
            per_layer_sliding_window=None if window is None else window + 1,
            attn_backend=KeyOnlyBackend,
            prefix=prefix,
        )  # fmt: skip
        # A tuple hides it from PyTorch: its layer values own it.
        self._bank = (bank,)

    @property
    def table(self) -> Tensor:
        """The rows that values are."""
        return self._bank[0].table

    def forward(self, query: Tensor, key: Tensor, token_ids: Tensor) -> Tensor:
        """(T, H*D) of queries (T, H*D), keys (T, K*D) and token ids (T,) of the new tokens."""
        output = torch.empty_like(query)
        torch.ops.vllm.unified_attention_with_output(
            query.view(-1, self.num_heads, self.head_size),
            key.view(-1, self.num_kv_heads, self.head_size),
            token_ids,
            output.view(-1, self.num_heads, self.head_size),
            _encode_layer_name(self.layer_name),
        )
        return output

    def get_kv_cache_spec(self, vllm_config):
        """Pages of keys alone."""
        return replace(super().get_kv_cache_spec(vllm_config), head_size_v=0)
