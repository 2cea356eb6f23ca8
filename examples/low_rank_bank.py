"""A value source of one's own, outside of the package: a bank of values of low rank.

Shapes: B batch, T new tokens, S tokens kept, V = n_kv_head * head_dim, R = rank.
"""

import torch
import torch.nn.functional as F
from torch import nn

from bov_lightning.model.attention import attend
from bov_lightning.model.layers import Linear
from bov_lightning.model.values import ValueSource


class LowRankBank(ValueSource):
    """v_p = W A[token_p]: a table A of R numbers per token and a matrix W, (V, R), for all tokens.

    A bank of values whose table has R columns instead of V.
    """

    rank = 16
    shareable = True
    value_cache = False
    optimizer_groups = {"table": "table"}

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Parameter(torch.empty(config.padded_vocab_size, self.rank))
        self.expand = Linear(self.rank, config.d_value)

    def initialise(self, values, prefix, embedding, fill):
        """Values of variance 1, as those of a bank."""
        bound = (3 / self.rank) ** 0.5
        fill.normal(f"{prefix}.source.table", self.table, 1.0)
        fill.uniform(f"{prefix}.source.expand.weight", self.expand.weight, -bound, bound)

    def matmul_parameters(self):
        return self.expand.weight.numel()

    def forward(self, inputs, projection):
        return self.expand(F.embedding(inputs.row_ids, self.table))

    def reserve(self, past):
        """A token's value follows from its id: decoding keeps ids and no values."""
        past.keep_row_ids()

    def attend_past(self, inputs, q_BHTD, k_BKSD, mask, past):
        """Attends to the R numbers of each token, then expands what came out: W is linear."""
        n_kv_head, group = k_BKSD.shape[1], q_BHTD.shape[1] // k_BKSD.shape[1]
        row_BSR = F.embedding(past.row_ids, self.table).to(q_BHTD.dtype)
        row_BKSR = row_BSR[:, None].expand(-1, n_kv_head, -1, -1)
        mixed_BHTR = attend(q_BHTD, k_BKSD.to(q_BHTD.dtype), row_BKSR, mask)
        w_KDR = self.expand.weight.unflatten(0, (n_kv_head, -1)).to(q_BHTD.dtype)
        return mixed_BHTR @ w_KDR.repeat_interleave(group, dim=0).mT
