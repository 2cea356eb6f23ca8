"""What a model loses when layers take their values from tables.

Texts are computed once, unchanged, and what each layer gave is kept. With some layers' values
replaced, those below the first of them give the same again, so that only the rest is computed. The
same holds beside other sets of layers: one that differs from the last one in a single layer gives
what that gave below it. The head comes last, for a few positions at a time.

Shapes: B rows, T tokens, P positions, V vocabulary, K value heads, D channels per head.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bov_lightning.value_probe.calibration import Table
from bov_lightning.value_probe.places import EnoughError, Place, after, call, replayed, values
from bov_lightning.value_probe.result import Cost
from bov_lightning.value_probe.rows import Rows
from evaluation.backends import Backend

MAX_LOGITS = 2**22
"""Elements of the fp32 logits that are computed together: what is made of them is then read from a
cache of usual size."""
MAX_KEPT = 2**27
"""Elements of probabilities that are kept while the order is sought."""
UNIT = 4
"""Rows after which it is decided whether a cost is known well enough, whatever a batch is."""
ABSOLUTE, RELATIVE = 0.01, 0.1
"""Standard error in nats, and per nat, that is well enough at precision 1."""


@dataclass(frozen=True)
class Condition:
    """Which layers have tables, and of which kind."""

    layers: tuple[int, ...]
    own_rows: int | None = None
    """How many of the most frequent ids have rows of their own; None: all."""

    @property
    def key(self) -> str:
        """Its name in the state."""
        return f"{','.join(map(str, self.layers))}:{'' if self.own_rows is None else self.own_rows}"

    def first_difference(self, other: "Condition") -> float:
        """The lowest layer that takes other values; infinity where none does."""
        own, others = ({(n, c.own_rows) for n in c.layers} for c in (self, other))
        return min((layer for layer, _ in own ^ others), default=math.inf)


UNCHANGED = Condition(())


@dataclass(frozen=True)
class Changed:
    """A batch, as the model computes it with tables."""

    condition: Condition
    outputs: list[Any]
    """What each layer gave."""


@dataclass
class Computed:
    """A batch, as the unchanged model computes it."""

    ids: Tensor
    keys: Tensor
    """Both (B, T) int64, as in `Rows`."""
    outputs: list[Any]
    """What each layer gave."""
    kept: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    """What `Bench.compare` has computed of it, by position, where it is to be compared often."""


@dataclass
class Tally:
    """Sums of one condition, one number per row of text."""

    nats: list[float] = field(default_factory=list)
    """Loss less that of the unchanged model."""
    kl: list[float] = field(default_factory=list)
    agreed: list[float] = field(default_factory=list)
    counted: list[float] = field(default_factory=list)
    """Targets."""

    def add(self, rows_B4: Tensor) -> None:
        """nats, KL, agreement and targets of some rows."""
        for name, column in zip(vars(self), rows_B4.T.tolist(), strict=True):
            getattr(self, name).extend(column)

    def first(self, n_row: int) -> "Tally":
        """Of the first rows alone."""
        return Tally(*(column[:n_row] for column in vars(self).values()))

    @property
    def cost(self) -> Cost:
        """Per target; the standard error is that of a mean over rows."""
        n, n_row = sum(self.counted), len(self.nats)
        nats, errors = sum(self.nats) / n, self._errors()
        error = math.sqrt(_product(errors, errors) / n_row) if n_row > 1 else math.nan
        return Cost(nats, error, sum(self.kl) / n, sum(self.agreed) / n, int(n))

    def cost_beside(self, other: "Tally | None") -> Cost:
        """As the cost of another, known of more rows, and the difference on the rows of both, if
        that is more exact (difference estimator of double sampling)."""
        plain, n_row = self.cost, len(self.nats)
        if other is None or len(other.nats) <= n_row:
            return plain
        common, all_of_it = other.first(n_row).cost, other.cost
        error = math.sqrt(max(0.0, self._variance_beside(other)))
        if not error < plain.standard_error:
            return plain
        nats, kl, agreement = (
            getattr(plain, name) + getattr(all_of_it, name) - getattr(common, name)
            for name in ("nats", "kl", "agreement")
        )
        return Cost(nats, error, kl, agreement, plain.n_token)

    def is_known(self, precision: float, other: "Tally | None" = None) -> bool:
        """Whether the standard error is small enough; or that of the difference to another, whose
        own comes on top, half as large."""
        n_row = len(self.nats)
        if n_row < UNIT or precision == 0:
            return False
        cost = self.cost
        enough = precision * (ABSOLUTE + RELATIVE * abs(cost.nats))
        if cost.standard_error <= enough:
            return True
        if other is None or len(other.nats) < n_row:
            return False
        difference = self._difference(other)
        return math.sqrt(_product(difference, difference) / n_row) <= enough / 2

    def _errors(self) -> list[float]:
        """How far each row's cost is from the mean one, per target."""
        n, n_row = sum(self.counted), len(self.nats)
        nats = sum(self.nats) / n
        return [(a - nats * c) / (n / n_row) for a, c in zip(self.nats, self.counted, strict=True)]

    def _difference(self, other: "Tally") -> list[float]:
        """Of the errors, on the rows of both."""
        others = other.first(len(self.nats))._errors()
        return [a - b for a, b in zip(self._errors(), others, strict=True)]

    def _variance_beside(self, other: "Tally") -> float:
        n_row, n_all = len(self.nats), len(other.nats)
        difference, errors = self._difference(other), other._errors()
        return (
            _product(difference, difference) / n_row
            + _product(errors, errors) / n_all
            + 2 * _product(difference, errors[:n_row]) / n_all
        )


def _product(a: list[float], b: list[float]) -> float:
    """The covariance of what has the mean 0."""
    return sum(x * y for x, y in zip(a, b, strict=True)) / (len(a) - 1)


class Bench:
    """A model whose values can be replaced.

    Args:
        model: in eval mode, its parameters without gradients.
        backend: calls it.
        places: the values of its layers.
        tables: what may take their place.
        most_frequent: keys (N,), those that calibration has seen most often first.
        start: the token that is no target.
    """

    def __init__(
        self, model: nn.Module, backend: Backend, places: list[Place], tables: dict[int, Table],
        most_frequent: Tensor, start: int,
    ):  # fmt: skip
        self.model, self.backend, self.places, self.start = model, backend, places, start
        self.tables, self.most_frequent = tables, most_frequent
        self.device = backend.device
        self.free = {layer for layer, table in tables.items() if table.context_free}

    def batches(self, rows: Rows, batch_size: int) -> Iterable[Rows]:
        """The rows, so many at a time."""
        return (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))

    @torch.no_grad()
    def compute(
        self, batch: Rows, see: Callable[[Place, Tensor, Tensor], None] | None = None
    ) -> Computed:
        """The unchanged model; ``see`` is shown place, values (B, T, K, D) and those of tables."""
        ids, keys = batch.ids.to(self.device), batch.keys.to(self.device)
        outputs: list[Any] = []

        def keep(place: Place, module: nn.Module, inputs: tuple, named: dict, out: Any) -> None:
            outputs.append(out)
            if place is self.places[-1]:
                raise EnoughError

        def show(place: Place, values_BTKD: Tensor) -> None:
            if see is not None:
                own = self.tables[place.layer].own.to(self.device)
                see(place, values_BTKD.float(), own[keys])

        with values(self.places, show), after(self.places, "block", keep):
            call(self.model, ids)
        return Computed(ids, keys, outputs)

    @torch.no_grad()
    def change(
        self, computed: Computed, condition: Condition, others: Iterable[Changed] = ()
    ) -> Changed:
        """The same batch with tables in place of some layers' values.

        ``others`` are of the same batch: what is the same in one of them is not computed again.
        """
        start = max(
            (Changed(UNCHANGED, computed.outputs), *others),
            key=lambda other: condition.first_difference(other.condition),
        )
        first = min(condition.first_difference(start.condition), len(self.places) - 1)
        tables = {layer: self._table(layer, condition.own_rows) for layer in condition.layers}
        outputs = start.outputs[:first]

        def replace(place: Place, values_BTKD: Tensor) -> Tensor:
            return tables[place.layer][computed.keys].to(values_BTKD.dtype)

        def keep(place: Place, module: nn.Module, inputs: tuple, named: dict, out: Any) -> None:
            outputs.append(out)
            if place is self.places[-1]:
                raise EnoughError

        below = list(zip(self.places, outputs, strict=False))
        above = self.places[first:]
        replaced = [place for place in above if place.layer in tables]
        with replayed(below), values(replaced, replace), after(above, "block", keep):
            call(self.model, computed.ids)
        return Changed(condition, outputs)

    def _table(self, layer: int, own_rows: int | None) -> Tensor:
        table, mask = self.tables[layer], None
        if own_rows is not None:
            mask = torch.zeros(len(table.own), dtype=torch.bool)
            chosen = self.most_frequent[:own_rows]
            mask[chosen[chosen < len(mask)]] = True
        return table.of(mask).to(self.device)

    @torch.no_grad()
    def compare(self, computed: Computed, lasts: list[Any]) -> tuple[Tensor, list[Tensor]]:
        """Losses and differences per row.

        Returns:
            (B, 2) fp64, loss of the unchanged model and targets; and for each of ``lasts``, which
            the last layer gave with tables, (B, 4): its loss less that, KL divergence to the
            unchanged model, positions with the same likeliest token, targets.
        """
        ids = computed.ids
        targets_BT, counted_BT = ids[:, 1:], ids[:, 1:] != self.start
        n_row, n_position = targets_BT.shape
        base_B2 = torch.zeros(n_row, 2, dtype=torch.float64)
        found = [torch.zeros(n_row, 4, dtype=torch.float64) for _ in lasts]
        size = max(1, MAX_LOGITS // (n_row * self.backend.vocab_size))
        for first in range(0, n_position, size):
            part = slice(first, min(first + size, n_position))
            counted = counted_BT[:, part].double()
            targets = targets_BT[:, part, None]
            right, likeliest, p, entropy_terms = self._unchanged(computed, part, targets)
            base_B2 += torch.stack(((right.double() * counted).sum(1), counted.sum(1)), 1).cpu()
            for out, last in zip(found, lasts, strict=True):
                logits = self._logits(computed, last, part)
                normaliser = logits.logsumexp(-1)
                loss = normaliser - logits.gather(-1, targets)[..., 0]
                kl = entropy_terms - torch.linalg.vecdot(p, logits) + normaliser
                columns = (loss - right, kl, (logits.argmax(-1) == likeliest).double())
                sums = [(column.double() * counted).sum(1) for column in columns]
                out += torch.stack((*sums, counted.sum(1)), dim=1).cpu()
        return base_B2, found

    def _unchanged(
        self, computed: Computed, part: slice, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of some positions: loss (B, P), likeliest token, probabilities (B, P, V), and the sum of
        p log p."""
        if computed.kept is not None and part.start in computed.kept:
            return computed.kept[part.start]
        logits = self._logits(computed, computed.outputs[-1], part)
        normaliser = logits.logsumexp(-1)
        right = normaliser - logits.gather(-1, targets)[..., 0]
        likeliest = logits.argmax(-1)
        log_p = logits.sub_(normaliser[..., None])
        p = log_p.exp()
        found = right, likeliest, p, torch.linalg.vecdot(p, log_p)
        if computed.kept is not None:
            computed.kept[part.start] = found
        return found

    def _logits(self, computed: Computed, last: Any, part: slice) -> Tensor:
        """(B, P, V) fp32 of some positions, all layers giving what they gave."""
        ids = computed.ids
        positions = torch.arange(part.start, part.stop, device=self.device).expand(len(ids), -1)
        outputs = [*computed.outputs[:-1], last]
        with replayed(list(zip(self.places, outputs, strict=True))):
            return self.backend.compute(ids, [ids.shape[1]] * len(ids), positions)


class Order:
    """In which order layers go: each time the one that costs least, beside those that are gone.

    Costs are KL divergences on a little text. What a layer costs beside others is seldom less than
    what it cost beside fewer, so that old numbers tell which few layers are worth measuring again
    (lazy greedy search).

    Args:
        bench: measures.
        rows: the text.
        batch_size: rows at once.
        known: costs by condition; what is measured is added.
        save: called after each.
    """

    TRIES = 3
    """Layers that are measured again for one place in the order, at most."""
    DIGITS = 5
    """Costs in nats are compared to so many decimals: less is rounding."""

    def __init__(
        self, bench: Bench, rows: Rows, batch_size: int, known: dict[str, float],
        save: Callable[[dict[str, float]], None],
    ):  # fmt: skip
        self.bench, self.known, self.save = bench, known, save
        self.rows, self.batch_size = rows, batch_size
        self._computed: list[Computed] = []
        self._near: list[list[Changed]] = []
        """Of each batch, sets of layers that the next ones may differ from but little."""

    def cost(self, layers: tuple[int, ...]) -> float:
        """KL divergence per token with tables in these layers."""
        condition = Condition(tuple(sorted(layers)))
        if condition.key not in self.known:
            if not self._computed:
                batches = self.bench.batches(self.rows, self.batch_size)
                self._computed = [self.bench.compute(batch) for batch in batches]
                self._near = [[] for _ in self._computed]
                if self.rows.n_token * self.bench.backend.vocab_size <= MAX_KEPT:
                    for computed in self._computed:
                        computed.kept = {}
            tally = Tally()
            for i, computed in enumerate(self._computed):
                changed = self.bench.change(computed, condition, self._near[i])
                if len(layers) > 1:
                    self._near[i].append(changed)
                tally.add(self.bench.compare(computed, [changed.outputs[-1]])[1][0])
            self.known[condition.key] = tally.cost.kl
            self.save(self.known)
        return self.known[condition.key]

    def __call__(self, layers: list[int]) -> list[int]:
        """The layers in their order; those that need no context come first."""
        order = [layer for layer in layers if layer in self.bench.free]
        left = [layer for layer in layers if layer not in self.bench.free]
        step = {layer: self.cost((layer,)) for layer in left}
        total, fresh = 0.0, set(left)
        while left:
            for _ in range(self.TRIES):
                best = min(left, key=lambda n: (round(step[n], self.DIGITS), n))
                if best in fresh:
                    break
                step[best] = self.cost((*order, best)) - total
                fresh.add(best)
            best = min(fresh, key=lambda n: (round(step[n], self.DIGITS), n))
            total += step[best]
            order.append(best)
            self._keep(tuple(sorted(order)))
            left.remove(best)
            fresh = set()
        return order

    def _keep(self, layers: tuple[int, ...]) -> None:
        """Only one of the sets that were computed, from which the next differ least."""
        for near in self._near:
            near[:] = [c for c in near if c.condition.layers == layers] or near[:1]
