"""`bov_lightning.probe`: which layers of a model need context in their values."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bov_lightning.distributed.ranks import Ranks
from bov_lightning.model.config import LAYER_SETS
from bov_lightning.model.transformer import Transformer
from bov_lightning.value_probe.calibration import Calibration, Table
from bov_lightning.value_probe.measuring import UNIT, Bench, Condition, Order, Tally
from bov_lightning.value_probe.places import Place, embedding_of, find_places
from bov_lightning.value_probe.result import ELEMENT_BYTES, LayerResult, ProbeResult, SetResult
from bov_lightning.value_probe.rows import Text, make_text
from bov_lightning.value_probe.settings import ProbeSettings
from bov_lightning.value_probe.state import State, digest_of
from evaluation.backends import Backend, HuggingFaceBackend, TransformerBackend
from evaluation.probe import Probe

SMALL_TABLE_SETS = (10, 6, 4, 3)
"""Small tables are measured with the first 1/n of the layers in their order."""
ANCHORS = (1 / 10, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1)
"""Sets with such shares of the order are measured by themselves; those between them, which lose
much the same on the same text, as differences to the next one."""

Progress = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is, and how much there is."""


def probe(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    settings: ProbeSettings | None = None,
    *,
    name: str | None = None,
    state_directory: str | Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> ProbeResult:
    """What is lost if the values of a model's layers become tables by token id.

    Nothing is trained, and the model is left as it was.

    Args:
        model: a `Transformer`, or a causal language model of ``transformers`` whose attention has a
            value projection in every layer.
        tokenizer: its tokenizer, of ``transformers``.
        texts: documents; no more are read than `ProbeSettings` asks for.
        settings: how much text, which layers, how exact.
        name: what the result calls it; the class if not given.
        state_directory: what is found is kept there, so that a call that is killed goes on.
        progress: told from time to time.

    Raises:
        UserError: a model that cannot be probed, too little text, a tokenizer of another model,
            weights that are not finite.
    """
    settings = settings or ProbeSettings()
    with _frozen(model):
        backend = _backend(model)
        text = make_text(texts, tokenizer, settings, backend.max_length, len(embedding_of(model)))
        Probe(backend, tokenizer, text.start, Ranks())()
        places = find_places(model)
        state = State(
            None if state_directory is None else Path(state_directory),
            _fingerprint(model, text, settings),
        )
        return _Run(model, backend, places, text, settings, state, progress)(name)


def _backend(model: nn.Module) -> Backend:
    own = isinstance(model, Transformer)
    return TransformerBackend(model) if own else HuggingFaceBackend(model)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients inside; as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, needed in gradients:
            parameter.requires_grad_(needed)


def _fingerprint(model: nn.Module, text: Text, settings: ProbeSettings) -> str:
    """Of what tables and order depend on."""
    how = f"{settings.row_length}-{settings.order_rows}"
    return "-".join((digest_of(model.state_dict()), _text_digest(text), how))


def _text_digest(text: Text) -> str:
    digest = hashlib.sha256()
    for rows in (text.calibration, text.choice, text.measured):
        digest.update(rows.ids.numpy().tobytes())
    return digest.hexdigest()[:16]


class _Run:
    """One call of `probe`."""

    def __init__(
        self, model: nn.Module, backend: Backend, places: list[Place], text: Text,
        settings: ProbeSettings, state: State, progress: Progress,
    ):  # fmt: skip
        self.model, self.backend, self.places, self.text = model, backend, places, text
        self.settings, self.state, self.progress = settings, state, progress
        self.candidates = settings.layers_of(len(places))

    def __call__(self, name: str | None) -> ProbeResult:
        tables = self._calibrate()
        counts = torch.bincount(
            self.text.calibration.keys.flatten(), minlength=len(self.text.vocabulary)
        )
        most_frequent = counts.argsort(descending=True, stable=True)
        bench = Bench(self.model, self.backend, self.places, tables, most_frequent, self.text.start)
        order = self._order(bench)
        n_seen = int((counts > 0).sum())
        sizes = [n for n in self.settings.own_row_counts if n < n_seen]
        conditions = self._conditions(order, sizes)
        references = self._references(order, sizes)
        measured = self._measure(bench, conditions, references)
        return self._result(name, tables, order, sizes, measured, references)

    def _calibrate(self) -> dict[int, Table]:
        calibration = Calibration(self.model, self.places, self.text, self.settings, self.state)
        return calibration(lambda done, total: self.progress("rows calibrated", done, total))

    def _order(self, bench: Bench) -> list[int]:
        def save(known: dict[str, float]) -> None:
            self.state.put(order=known)
            self.progress("sets compared", len(known), 0)

        rows = self.text.choice[: self.settings.order_rows]
        known = dict(self.state.get("order", {}))
        return Order(bench, rows, self.settings.batch_size, known, save)(self.candidates)

    @property
    def last_third(self) -> list[int]:
        """The paper's choice."""
        n = len(self.places)
        return [layer for layer in range(n) if LAYER_SETS["last_third"](layer, n)]

    def _small_sets(self, order: list[int]) -> list[list[int]]:
        counts = sorted({len(order) // n for n in SMALL_TABLE_SETS} - {0})
        return [order[:n] for n in counts]

    def _conditions(self, order: list[int], sizes: list[int]) -> list[Condition]:
        """All that is measured, each once."""
        wanted = [[layer] for layer in sorted(order)]
        wanted += [order[:n] for n in range(1, len(order) + 1)]
        wanted.append(self.last_third)
        conditions = [_condition(layers) for layers in wanted]
        conditions += [_condition(s, n) for s in self._small_sets(order) for n in sizes]
        return list(dict.fromkeys(conditions))

    def _references(self, order: list[int], sizes: list[int]) -> dict[str, str]:
        """By condition, the one that it is compared with."""
        anchors = sorted({max(1, int(share * len(order) + 1e-9)) for share in ANCHORS})
        found = {}
        for first, last in zip([0, *anchors], anchors, strict=False):
            for n in range(first + 1, last):
                found[_condition(order[:n]).key] = _condition(order[:last]).key
        for layers in self._small_sets(order):
            for n in sizes:
                found[_condition(layers, n).key] = _condition(layers).key
        by_themselves = {_condition([layer]).key for layer in order}
        return {key: other for key, other in found.items() if key not in by_themselves}

    def _measure(
        self, bench: Bench, conditions: list[Condition], references: dict[str, str]
    ) -> dict[str, Any]:
        """Tallies by condition, the loss, and sums of the values, over the held-out rows.

        All of it is kept after every few rows. Whether a condition needs more of them is decided at
        the same rows whatever the batch is.
        """
        precision = self.settings.precision
        found = {
            "precision": precision, "rows": 0, "base": [],
            "conditions": {c.key: vars(Tally()) for c in conditions},
            "left": [], "squares": [], "sums": [],
        }  # fmt: skip
        kept = self.state.get("measured", found)
        if (kept["precision"], {*kept["conditions"]}) == (precision, {*found["conditions"]}):
            found = kept
        spread = _Spread.of(self.places, found)
        rows = self.text.measured
        while found["rows"] < len(rows):
            unit = rows[found["rows"] : found["rows"] + UNIT]
            tallies = {key: Tally(**t) for key, t in found["conditions"].items()}
            open_ones = [
                c for c in conditions
                if not tallies[c.key].is_known(precision, tallies.get(references.get(c.key)))
            ]  # fmt: skip
            for batch in bench.batches(unit, self.settings.batch_size):
                computed = bench.compute(batch, spread.add)
                lasts, near = [], []
                for condition in open_ones:
                    near = [bench.change(computed, condition, near)]
                    lasts.append(near[0].outputs[-1])
                base, differences = bench.compare(computed, lasts)
                found["base"] += base.tolist()
                for condition, rows_B4 in zip(open_ones, differences, strict=True):
                    tallies[condition.key].add(rows_B4)
            found["rows"] += len(unit)
            found["conditions"] = {key: vars(tally) for key, tally in tallies.items()}
            found |= spread.as_lists()
            self.state.put(measured=found)
            self.progress("held-out rows measured", found["rows"], len(rows))
        return found

    def _result(
        self, name: str | None, tables: dict[int, Table], order: list[int], sizes: list[int],
        measured: dict[str, Any], references: dict[str, str],
    ) -> ProbeResult:  # fmt: skip
        tallies = {key: Tally(**t) for key, t in measured["conditions"].items()}

        def of_set(layers: list[int], own_rows: int | None = None) -> SetResult:
            key = _condition(layers, own_rows).key
            cost = tallies[key].cost_beside(tallies.get(references.get(key)))
            return SetResult(layers, cost, own_rows, **self._bytes(layers, own_rows))

        spread = _Spread.of(self.places, measured)
        layers = [
            LayerResult(
                place.layer,
                tallies[_condition([place.layer]).key].cost if place.layer in order else None,
                *spread.explained(place.layer, self.text.measured.n_token),
                tables[place.layer].context_free, place.cached, tables[place.layer].strength,
                tables[place.layer].weighted,
            )
            for place in self.places
        ]  # fmt: skip
        nats = sum(loss for loss, _ in measured["base"]) / sum(n for _, n in measured["base"])
        text, first = self.text, self.places[0]
        return ProbeResult(
            name=name or type(self.model).__name__,
            make=type(self.model).__name__,
            n_layer=len(self.places), n_head=first.n_head, head_dim=first.head_dim,
            vocab_size=len(embedding_of(self.model)),
            nats=nats,
            tokens={
                part: getattr(text, part).n_token for part in ("calibration", "choice", "measured")
            },
            text=_text_digest(text),
            layers=layers,
            curve=[of_set(order[:n]) for n in range(1, len(order) + 1)],
            last_third=of_set(self.last_third),
            small_tables=[of_set(s, n) for s in self._small_sets(order) for n in sizes],
        )  # fmt: skip

    def _bytes(self, layers: list[int], own_rows: int | None) -> dict[str, Any]:
        """What a set saves, and what its tables take."""
        n_row, n_channel = embedding_of(self.model).shape
        if own_rows is not None:
            # The regression is a matrix from the embedding, with a bias.
            n_row = own_rows + n_channel + 1
        everything = sum(place.width for place in self.places)
        saving = [self.places[i].width for i in layers if self.places[i].cached]
        saved = ELEMENT_BYTES * sum(saving)
        table_bytes = saved * n_row
        return {
            "saved_bytes_per_token": saved,
            "saved_share": sum(saving) / everything,
            "table_bytes": table_bytes,
            "break_even_tokens": n_row if saved else None,
        }


def _condition(layers: list[int], own_rows: int | None = None) -> Condition:
    return Condition(tuple(sorted(layers)), own_rows)


class _Spread:
    """Sums of held-out values, from which follows what tables explain of them."""

    def __init__(self, left: list[Tensor], squares: list[Tensor], sums: list[Tensor]):
        """Per layer, fp64: (K,) of squared distances to the table, (K,) of squares, (K, D)."""
        self.left, self.squares, self.sums = left, squares, sums

    @classmethod
    def of(cls, places: list[Place], found: dict[str, Any]) -> "_Spread":
        """Going on with what a state holds."""

        def tensors(name: str, shape: Callable[[Place], tuple]) -> list[Tensor]:
            stored = found[name] or [[] for _ in places]
            return [
                torch.tensor(s, dtype=torch.float64)
                if s
                else torch.zeros(shape(p), dtype=torch.float64)
                for s, p in zip(stored, places, strict=True)
            ]

        return cls(
            tensors("left", lambda p: (p.n_head,)),
            tensors("squares", lambda p: (p.n_head,)),
            tensors("sums", lambda p: (p.n_head, p.head_dim)),
        )

    def add(self, place: Place, values_BTKD: Tensor, table_BTKD: Tensor) -> None:
        """One batch of a layer."""
        found = values_BTKD.double()
        distance = (found - table_BTKD.double()).square()
        self.left[place.layer] += distance.sum((0, 1, 3)).cpu()
        self.squares[place.layer] += found.square().sum((0, 1, 3)).cpu()
        self.sums[place.layer] += found.sum((0, 1)).cpu()

    def as_lists(self) -> dict[str, list]:
        """For the state."""
        return {name: [t.tolist() for t in getattr(self, name)] for name in vars(self)}

    def explained(self, layer: int, n_token: int) -> tuple[float, list[float]]:
        """Share of the variance around the mean that the table explains: all heads, and each."""
        around = self.squares[layer] - self.sums[layer].square().sum(1) / n_token
        per_head = 1 - self.left[layer] / around
        return float(1 - self.left[layer].sum() / around.sum()), per_head.tolist()
