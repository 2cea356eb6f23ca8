"""Value tables in the host's memory while they are trained, for those that a device cannot hold.

Before the layers of a micro-step run, its distinct rows come to the device, of every table into a
small tensor that the values are looked up in. What the backward pass leaves there goes back to the
host, where the micro-steps of a step are added up by row. `bov_lightning.optim.row_adamw` updates
the rows that a step has touched.

Each of several ranks holds a part of the rows, the same part that FSDP2 would give it (DTensor's
``Shard(0)``), so that checkpoints are those of tables on the device. Rows, and gradients, are sent
from host to host.

Shapes: N row numbers, U distinct ones, W = width of a row.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bov_lightning.distributed.ranks import Ranks
from bov_lightning.distributed.sharding import local_part
from bov_lightning.model.offload import HostTable, moved
from bov_lightning.model.transformer import Transformer
from bov_lightning.model.values import BankOfValues


def distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ones in ascending order, (U,), and which of them each is."""
    return ids.unique(return_inverse=True)


class Exchange:
    """Some distinct rows that this rank asks for, and those that the others ask this one for."""

    def __init__(self, ids_U: Tensor, share: int, ranks: Ranks):
        """
        Args:
            ids_U: int64, on the CPU, ascending.
            share: rows per rank; rank r has those from r * share on.
            ranks: all of them make one together.
        """
        self.ids, self._ranks = ids_U, ranks
        self.wanted = ids_U
        """Numbers among this rank's own rows, rank by rank."""
        self.n_wanted = self._n_asked = [len(ids_U)]
        """Of each rank."""
        if ranks.active:
            ends = torch.searchsorted(ids_U, share * torch.arange(1, ranks.size + 1))
            asked = ends.diff(prepend=ends.new_zeros(1))
            wanted = torch.empty_like(asked)
            dist.all_to_all_single(wanted, asked, group=ranks.group)
            self._n_asked, self.n_wanted = asked.tolist(), wanted.tolist()
            self.wanted = ids_U.new_empty(sum(self.n_wanted))
            self._send(ids_U, self.wanted, self._n_asked, self.n_wanted)
            self.wanted -= share * ranks.rank

    def _send(self, out: Tensor, into: Tensor, n_out: list[int], n_into: list[int]) -> None:
        dist.all_to_all_single(into, out, n_into, n_out, group=self._ranks.group)

    def fetch(self, own: Tensor) -> Tensor:
        """The rows that were asked for, (U, W), from everybody's ``own``."""
        wanted = own.index_select(0, self.wanted)
        if not self._ranks.active:
            return wanted
        rows = own.new_empty(len(self.ids), own.shape[1])
        self._send(wanted, rows, self.n_wanted, self._n_asked)
        return rows

    def deliver(self, gradient_UW: Tensor) -> tuple[Tensor, ...]:
        """The other way: of each rank what it has for the rows that it asked this one for."""
        if not self._ranks.active:
            return (gradient_UW,)
        into = gradient_UW.new_empty(len(self.wanted), gradient_UW.shape[1])
        self._send(gradient_UW, into, self._n_asked, self.n_wanted)
        return into.split(self.n_wanted)


class TrainedTable(HostTable):
    """One bank's table while it is trained."""

    def __init__(self, tables: "TablesOnHost", shape: torch.Size):
        self.tables, (self.n_row, self.width) = tables, shape
        self.collective = tables.ranks.active
        self.parameter = nn.Parameter(tables.empty(shape))
        self.nbytes = self.parameter.nbytes
        self.rows: Tensor | None = None
        """Those of the micro-step, (U, W), on the device."""
        self.received: Tensor | None = None
        """The gradient of the micro-step's rows, (U, W)."""
        self.gradient: Tensor | None = None
        """The sum over the step's micro-steps so far, of the rows `TablesOnHost.ids`."""

    def begin(self, exchange: Exchange, device: torch.device, dtype: torch.dtype) -> None:
        """Brings the rows of a micro-step to the device."""
        rows = exchange.fetch(local_part(self.parameter.detach())).to(dtype)
        self.rows = moved(rows, device).requires_grad_(torch.is_grad_enabled())
        if self.rows.requires_grad:
            self.rows.register_post_accumulate_grad_hook(self._receive)

    def _receive(self, rows: Tensor) -> None:
        if rows is not self.rows:
            raise RuntimeError(
                "tables_on: host has the rows of one micro-step: its backward pass comes before "
                "the next forward pass"
            )
        self.received, rows.grad = rows.grad, None

    def look_up(self, row_ids: Tensor, like: Tensor) -> Tensor:
        """The rows of the micro-step that `begin` has brought, in its dtype."""
        return F.embedding(self.tables.inverse, self.rows)

    def take(self, ids_N: Tensor) -> Tensor:
        """Distinct rows in ascending order, for a cache; all ranks together."""
        return self.tables.ask(ids_N).fetch(local_part(self.parameter.detach()))


class TablesOnHost:
    """All value tables of a model; `keep_tables_on_host` makes it."""

    def __init__(self, shape: torch.Size, ranks: Ranks, dtype: torch.dtype):
        """
        Args:
            shape: of each table.
            ranks: they share the rows; used by nobody else.
            dtype: of rows on the device; gradients are summed up in fp32.
        """
        self.n_row, self.width = shape
        self.ranks, self.dtype = ranks, dtype
        self.share = -(-self.n_row // ranks.size)
        self.tables: list[TrainedTable] = []
        self.inverse: Tensor | None = None
        """Which of the micro-step's distinct rows each of its row numbers is."""
        self.ids: Tensor | None = None
        """(U,): the distinct rows that the step has touched so far."""
        self._batch_ids: Tensor | None = None

    def empty(self, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of ``shape`` (n_row, ...) whose rows the ranks share, in the host's memory."""
        if not self.ranks.active:
            return torch.empty(shape, dtype=dtype, device="cpu")
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        n_own = max(0, min(self.share, shape[0] - self.ranks.rank * self.share))
        own = torch.empty(n_own, *shape[1:], dtype=dtype, device="cpu")
        mesh = DeviceMesh.from_group(self.ranks.group, "cpu")
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    def ask(self, ids_U: Tensor) -> Exchange:
        """Asks for distinct rows, in ascending order; all ranks together."""
        return Exchange(ids_U, self.share, self.ranks)

    def fetch(self, row_ids: Tensor) -> None:
        """Brings the rows of a micro-step to the device, all tables'; all ranks together.

        Where the device is a GPU, the host waits for it here: for the numbers, then for the
        gradients of the micro-step before.
        """
        ids, inverse = distinct(row_ids.cpu())
        self._add_up()
        self.inverse = moved(inverse, row_ids.device)
        exchange = self.ask(ids)
        for table in self.tables:
            table.begin(exchange, row_ids.device, self.dtype)
        self._batch_ids = ids if torch.is_grad_enabled() else None

    def _add_up(self) -> None:
        """Adds the gradients of the micro-step to those of the step."""
        if self._batch_ids is None or all(table.received is None for table in self.tables):
            return
        before, new = self.ids, self._batch_ids
        self._batch_ids = None
        if before is None:
            self.ids = new
        else:
            self.ids, places = distinct(torch.cat((before, new)))
            old_places, new_places = places.split((len(before), len(new)))
        for table in self.tables:
            received, table.received, table.rows = table.received, None, None
            if received is None:
                received = torch.zeros(len(new), table.width)
            received = received.to("cpu", torch.float32)
            if before is None:
                table.gradient = received
                continue
            total = torch.zeros(len(self.ids), table.width)
            total.index_copy_(0, old_places, table.gradient)
            table.gradient = total.index_add_(0, new_places, received)

    def take_gradients(self) -> tuple[Tensor, list[Tensor]]:
        """The touched ones among this rank's own rows, (N,) numbers among these, and the gradient
        of each table for them, (N, W): the mean over the ranks, as FSDP2 and DDP give it.

        All ranks together; afterwards a new step begins. The sum is taken in the order of the
        ranks, so that it is the same in every run.
        """
        self._add_up()
        exchange = self.ask(torch.empty(0, dtype=torch.int64) if self.ids is None else self.ids)
        found, gradients = exchange.wanted, []
        if self.ranks.active:
            found, places = distinct(found)
            places = places.split(exchange.n_wanted)
        for table in self.tables:
            gradient, table.gradient = table.gradient, None
            if gradient is None:
                gradient = torch.zeros(0, table.width)
            parts = exchange.deliver(gradient)
            if self.ranks.active:
                total = torch.zeros(len(found), table.width)
                for place, part in zip(places, parts, strict=True):
                    total.index_add_(0, place, part)
                parts = (total.div_(self.ranks.size),)
            gradients.append(parts[0])
        self.ids = None
        return found, gradients


def banks_of(model: nn.Module) -> list[tuple[str, BankOfValues]]:
    """The banks whose tables can leave the device, with their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BankOfValues) and module.reads_as_bank()
    ]


def keep_tables_on_host(
    model: Transformer, ranks: Ranks, dtype: torch.dtype | None = None
) -> TablesOnHost:
    """Puts empty tables in the host's memory in the place of a model's own, which may be on the
    meta device: to be initialised afterwards.

    Args:
        model: whose banks all have tables of one shape.
        ranks: they share the rows; used by nobody else.
        dtype: of rows on the device; None: fp32.
    """
    banks = [bank for _, bank in banks_of(model)]
    tables = TablesOnHost(banks[0].table.shape, ranks, dtype or torch.float32)
    for bank in banks:
        table = TrainedTable(tables, bank.table.shape)
        tables.tables.append(table)
        bank.train_on_host(table, table.parameter)
    model.fetch_rows = tables.fetch
    return tables


def host_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tables that are trained in the host's memory, by name."""
    found = ((name, bank) for name, bank in banks_of(model) if bank.trains_on_host)
    return {f"{name}.table": bank.table for name, bank in found}
