"""The network as a model of vLLM's: its own `Transformer`, on vLLM's pages.

Shapes: N new tokens of all requests, C = d_model.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.layers import Initialiser, rms_norm
from bov_lightning.model.transformer import Block, Transformer
from bov_vllm.key_only import KeyOnly
from bov_vllm.pages import PagedLayer, Pages, StoredValues
from bov_vllm.refusals import Refusals


def kind_of_pages(shape: TransformerConfig, chosen: str | None) -> str:
    """What the pages of bank layers hold: ``stored`` (keys and values) or ``keys``.

    ``chosen`` is ``bov_values`` of the configuration, which ``--hf-overrides`` sets too.
    """
    return chosen or ("keys" if len(set(shape.windows)) == 1 else "stored")


def layer_class(kind: str, block: Block) -> Callable[..., PagedLayer]:
    """What makes the pages of one block: the one place that chooses."""
    bank = block.attention.value.bank
    return StoredValues if kind == "stored" or bank is None else partial(KeyOnly, bank)


def n_previous(network: Transformer) -> int:
    """How many ids before its own a token needs: the smear one, value sources what they reach."""
    return max(1, network.lookup_source.reach)


@support_torch_compile
class PagedTransformer(Transformer):
    """The network whose past lies in vLLM's pages."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        given = vllm_config.model_config.hf_config
        shape = given.transformer_config()
        super().__init__(shape)
        kind = kind_of_pages(shape, getattr(given, "bov_values", None))
        self.pages = nn.ModuleList(
            layer_class(kind, block)(
                shape, block.window, vllm_config.cache_config, f"{prefix}.blocks.{i}.attention"
            )
            for i, block in enumerate(self.blocks)
        )
        # The last layer sees whole texts in every network.
        self.pages[-1].keeps_ids = True
        self.ids_layer = self.pages[-1].layer_name
        self.n_previous = n_previous(self)
        self.requires_grad_(False)

    def initialise(self, fill: Initialiser) -> None:
        """Nothing: the weights are read."""

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor,
        previous_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The normed stream after the last block, (N, C).

        ``previous_ids`` (N, n_previous): the ids before each token, the nearest first and `NOTHING`
        beyond its text, where vLLM's runner can tell.
        """
        if previous_ids is None:
            previous_ids = torch.ops.vllm.bov_previous_ids(
                input_ids, positions, self.ids_layer, self.n_previous
            )
        previous_Nn = previous_ids.long()
        previous_NC = rms_norm(self.embedding(previous_Nn[:, 0].clamp(min=0)))
        previous_NC = previous_NC.masked_fill((positions == 0)[:, None], 0)
        pages = Pages(
            list(self.pages), self.config.windows, self.lookup_source, positions, previous_Nn,
            previous_NC,
        )  # fmt: skip
        x_NTC = self.stream(input_ids.long()[:, None], cache=pages)
        return rms_norm(x_NTC[:, 0])


class BoVForCausalLM(nn.Module):
    """What vLLM asks of a language model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        Refusals.verify_and_update_config(vllm_config)
        self.model = PagedTransformer(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """(N, C)."""
        return self.model.embedding(input_ids)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: None = None,
        inputs_embeds: None = None, previous_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The normed stream after the last block, (N, C)."""
        return self.model(input_ids, positions, previous_ids)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Soft-capped, in fp32, (..., vocab_size)."""
        return self.model.head(hidden_states, None, "mean")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Reads the export's weights, which have the same names; returns those."""
        buffers, found = dict(self.named_buffers()), set()

        def parameters() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name not in buffers:
                    yield name, tensor
                    continue
                # vLLM's loader knows parameters alone.
                buffers[name].copy_(tensor)
                found.add(name)

        return AutoWeightsLoader(self).load_weights(parameters()) | found

    @staticmethod
    def get_model_state_cls() -> type:
        """What vLLM's second runner keeps for this model; the first one does not ask."""
        from bov_vllm.model_state import PastIds

        return PastIds
