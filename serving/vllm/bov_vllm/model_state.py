"""What vLLM's second runner, which needs Triton and so a GPU, keeps for the network.

Written from the runner's source and not run yet: no GPU was at hand. `past_ids` is tested.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from bov_vllm.past_ids import previous_of_requests


class PastIds(DefaultModelState):
    """Hands the ids before each token to the network's forward pass."""

    supports_prompt_embeds = False

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        # CUDA graphs read what they were recorded with.
        self.n = self.model.model.n_previous
        self.previous = torch.zeros(
            self.max_num_tokens, self.n, dtype=torch.int32, device=self.device
        )

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, Tensor | None]:
        """What `forward` takes besides ids and positions."""
        n_token = input_batch.num_tokens_after_padding
        n_request = input_batch.num_reqs
        self.previous[:n_token] = previous_of_requests(
            input_batch.input_ids[:n_token],
            input_batch.positions[:n_token],
            input_batch.query_start_loc[: n_request + 1],
            input_batch.idx_mapping[:n_request].long(),
            req_states.all_token_ids.gpu,
            self.n,
        )
        given = super().prepare_inputs(input_batch, req_states)
        return given | {"previous_ids": self.previous[:n_token]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """The same while graphs are recorded."""
        given = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return given | {"previous_ids": self.previous[:num_tokens]}
