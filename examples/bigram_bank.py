"""A value source of one's own, outside of the package: a bank that sees the token before, too."""

import torch

from bov_lightning.model.values import BankOfValues


class BigramBank(BankOfValues):
    """v_t = T[id_t] + T[V + row of (id_(t-1), id_t)]: bigrams share 4,093 rows by a hash."""

    reach = 1
    n_bigram = 4093

    def __init__(self, config):
        super().__init__(config, n_more=self.n_bigram)

    def row_ids(self, ngrams, positions):
        token, before = ngrams.unbind(-1)
        bigram = (before * 1_000_003 + token * 1_009) % self.n_bigram
        return torch.stack((token, self.n_vocab + bigram), dim=-1)
