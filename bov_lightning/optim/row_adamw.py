"""AdamW of the rows of value tables in the host's memory: those that a step has touched.

For a row with gradient g at its own t-th update (t counts the updates of that row, not the steps of
the run), with the learning rate of the step and everything else as in AdamW (arXiv 1711.05101,
algorithm 2):

    row <- (1 - lr * weight_decay) * row
    m   <- beta1 * m + (1 - beta1) * g
    v   <- beta2 * v + (1 - beta2) * g^2
    row <- row - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

A row that no token of the step reads stays as it is: neither it nor its moments decay meanwhile
("lazy" Adam). Its moments are then averages over its last updates, however long ago, and with t
counted per row the bias of the zeros that they started from is taken out exactly: the first update
of a row is the first step of a fresh AdamW, whenever it comes. AdamW of whole tables divides by
1 - beta^step there, so that a row's first update at a late step is larger by
(1 - beta1) / sqrt(1 - beta2).

Rows that are touched in every step get the same bits as those of a table on the CPU: rows with the
same t go to the same fused kernel together.
"""

import math

import torch
from torch import Tensor

from bov_lightning.distributed.host_tables import TablesOnHost, TrainedTable
from bov_lightning.distributed.sharding import local_part
from bov_lightning.optim.adamw import step_adamw

ROWS_AT_ONCE = 2**15
"""So many are gathered, updated and put back at a time."""
UPDATES = "row_updates"
"""Name of the state that counts each row's updates."""


class RowAdamW:
    """Updates the touched rows of tables in the host's memory; `MuonAdamW` has one for them.

    The state of a table is that of AdamW, with the same names and shapes, and ``row_updates``,
    (n_row,) float32: how often each row was updated. All are shared by the ranks as the rows are.
    ``step`` counts the steps of the run, for a run that goes on with its tables on the device.
    """

    def __init__(self, tables: TablesOnHost):
        self.tables = tables
        self._found: tuple[Tensor, list[Tensor]] | None = None

    def holds(self, parameter: Tensor) -> bool:
        """Whether a parameter is one of the tables."""
        return any(parameter is table.parameter for table in self.tables.tables)

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a table before its first step."""
        counts = self.tables.empty(parameter.shape[:1])
        return {
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
            UPDATES: torch.zeros_like(counts),
        }

    def gather(self) -> float:
        """Ends the step's gradients; the sum of their squares, over all tables and ranks."""
        self._found = self.tables.take_gradients()
        norms = [torch.linalg.vector_norm(gradient).item() for gradient in self._found[1]]
        return self.tables.ranks.total([math.fsum(norm * norm for norm in norms)])[0]

    @torch.no_grad()
    def step(self, states: dict[Tensor, dict[str, Tensor]], groups: list[dict]) -> None:
        """Updates the rows whose gradients `gather` has found."""
        ids, gradients = self._found
        self._found = None
        group_of = {p: group for group in groups for p in group["params"] if self.holds(p)}
        for table, gradient in zip(self.tables.tables, gradients, strict=True):
            parameter = table.parameter
            state = states[parameter]
            state["step"] += 1
            _update(table, state, ids, gradient, group_of[parameter])


def _update(
    table: TrainedTable, state: dict[str, Tensor], ids: Tensor, gradient: Tensor, group: dict
) -> None:
    """One step of the rows ``ids`` of this rank's part."""
    whole = [local_part(x) for x in (table.parameter, state["exp_avg"], state["exp_avg_sq"])]
    updates = local_part(state[UPDATES])
    # Beyond so many updates both corrections are 1 in double precision: one kind of rows fewer.
    most = math.ceil(-54 * math.log(2) / math.log(max(group["betas"])))
    by_count = updates[ids].argsort(stable=True)
    for places in by_count.split(ROWS_AT_ONCE):
        own = ids[places]
        counts, sizes = updates[own].clamp(max=most).unique_consecutive(return_counts=True)
        rows, exp_avg, exp_avg_sq = found = [x.index_select(0, own) for x in whole]
        parts = [
            list(x.split(sizes.tolist()))
            for x in (rows, gradient.index_select(0, places), exp_avg, exp_avg_sq)
        ]
        step_adamw(*parts, list(counts.unbind()), group)
        for x, new in zip(whole, found, strict=True):
            x.index_copy_(0, own, new)
        updates[own] += 1
