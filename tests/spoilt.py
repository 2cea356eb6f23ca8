"""Value sources with a mistake each, whose rows start at zero as those of a cautious author would:
what the tests of variants, and the trial before training, must not let pass."""

import torch
import torch.nn.functional as F
from torch import nn

from bov_lightning.model.values import ValueSource


class Rows(ValueSource):
    """A row per token, zero at first; which row is the mistake."""

    optimizer_groups = {"table": "table"}

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Parameter(torch.empty(config.padded_vocab_size, config.d_value))
        self.document_start = config.document_start

    def initialise(self, values, prefix, embedding, fill):
        fill.constant(self.table, 0)

    def forward(self, inputs, projection):
        return F.embedding(self.pick(inputs), self.table)


class Right(Rows):
    """No mistake."""

    def pick(self, inputs):
        return inputs.token_ids


class NextToken(Rows):
    """The token that is to be predicted."""

    def pick(self, inputs):
        return inputs.token_ids.roll(-1, dims=1)


class AcrossDocuments(Rows):
    """The token before, in whatever document."""

    def pick(self, inputs):
        return F.pad(inputs.token_ids, (1, 0))[:, :-1]


class Neighbour(Rows):
    """The token before in the same document, but from the new tokens alone when decoding."""

    def pick(self, inputs):
        ids = inputs.token_ids
        before = F.pad(ids, (1, 0))[:, :-1]
        return before if self.document_start is None else before * (ids != self.document_start)
