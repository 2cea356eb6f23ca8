"""Tables of values by token id, from one forward pass over text.

A token's row is the mean of its values, shrunk towards what a ridge regression from its normed
embedding says: (S + k r) / (n + k) for n values with the sum S and the regression's r. Rare ids are
thus mostly regression, unseen ones nothing else. The means may be weighted by the attention that
each value got. All of this is chosen on text of its own, per layer.

Shapes: N keys (rows of tables), K value heads, D channels per head, W = K * D, F features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bov_lightning.value_probe.attention import Attending
from bov_lightning.value_probe.places import (
    EnoughError,
    Place,
    after,
    attended,
    call,
    embedding_of,
    values,
)
from bov_lightning.value_probe.rows import Rows, Text
from bov_lightning.value_probe.settings import ProbeSettings
from bov_lightning.value_probe.state import State

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Tried for the regression, relative to the mean eigenvalue."""
STRENGTHS = (0.25, 1.0, 4.0, 16.0, 64.0)
"""Tried for k, in tokens."""
TYPE_WEIGHT = 10.0
"""An id with n tokens counts n / (n + this) in the regression: frequent ones alike, rare ones less,
since their means are uncertain."""
SAVES = 8
"""How often the sums are kept during a pass."""
SAME = {torch.float32: 1e-4, torch.float64: 1e-4}
"""How far values may be apart, relative to their size, to count as the same; 0.02 for others."""
SAME_ATTENTION = 0.02
"""The same for the attention that values get, computed in two ways."""


@dataclass(frozen=True)
class Table:
    """What takes the place of a layer's values, for the ids of evaluated text."""

    own: Tensor
    """(N, K, D) fp32."""
    regression: Tensor
    """The same for an id without a row of its own."""
    strength: float
    """k; 0 where the layer's values need no context at all."""
    weighted: bool
    """Whether means are weighted by attention."""
    context_free: bool
    """Whether a token's values are the same wherever it stands."""

    def of(self, most_frequent: Tensor | None) -> Tensor:
        """(N, K, D), with own rows where ``most_frequent`` (N, bool) says so; None: everywhere."""
        if most_frequent is None:
            return self.own
        return torch.where(most_frequent[:, None, None], self.own, self.regression)


@dataclass
class Sums:
    """Of the values of some text, by key."""

    plain: Tensor
    """(N, K, D) fp32."""
    weighted: Tensor
    """(N, K, D) fp32, each value times the attention that it gets."""
    attention: Tensor
    """(N, K) fp32, summed over queries and over the query heads that share a value head."""
    squares: Tensor
    """(K,) fp64: sum of the squares of all values."""

    @classmethod
    def empty(cls, n_key: int, place: Place, device: torch.device) -> "Sums":
        """All zero."""
        heads, channels = place.n_head, place.head_dim
        return cls(
            torch.zeros(n_key, heads, channels, device=device),
            torch.zeros(n_key, heads, channels, device=device),
            torch.zeros(n_key, heads, device=device),
            torch.zeros(heads, dtype=torch.float64, device=device),
        )

    def add(self, keys_BT: Tensor, values_BTKD: Tensor, attention_BTK: Tensor) -> None:
        """One batch."""
        keys, found = keys_BT.flatten(), values_BTKD.flatten(0, 1).float()
        weight = attention_BTK.flatten(0, 1).float()
        self.plain.index_add_(0, keys, found)
        self.weighted.index_add_(0, keys, found * weight[..., None])
        self.attention.index_add_(0, keys, weight)
        self.squares += found.double().square().sum((0, 2))


See = Callable[[Place, Tensor, Tensor], None]
"""Takes a place, its values (B, T, K, D), and the attention that each gets (B, T, K)."""


def collect(
    model: nn.Module, places: list[Place], rows: Rows, batch_size: int, sums: dict[int, Sums]
) -> Iterator[int]:
    """Adds to the sums, batch by batch; yields how many rows it has seen."""
    device = next(model.parameters()).device
    run = _by_shares if _tells_shares(model, places, rows[:1].ids.to(device)) else _by_derivative
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        keys = batch.keys.to(device)
        run(model, places, batch.ids.to(device), lambda p, v, a, k=keys: sums[p.layer].add(k, v, a))
        yield first + len(batch)


def _tells_shares(model: nn.Module, places: list[Place], ids_BT: Tensor) -> bool:
    """Whether the faster way is right for this model: each layer attends once by PyTorch's
    function, and what that says of its shares is what the derivative says."""
    shares: list[Tensor] = []
    agree: list[bool] = []

    def compare(place: Place, values_BTKD: Tensor, attention_BTK: Tensor) -> None:
        fits = [tuple(share.shape[:2]) for share in shares] == [tuple(ids_BT.shape)]
        if fits:
            error = _per_value_head(shares[0], place) - attention_BTK
            fits = bool(error.norm() <= SAME_ATTENTION * attention_BTK.float().norm())
        agree.append(fits)

    # Layers below and between these attend, too.
    with Attending(shares.append), values(places, lambda place, values_BTKD: shares.clear()):
        _by_derivative(model, places, ids_BT, compare)
    return all(agree)


def _per_value_head(share_BTH: Tensor, place: Place) -> Tensor:
    """(B, T, K): query heads follow each other that share a value head."""
    return share_BTH.unflatten(-1, (place.n_head, -1)).sum(-1)


def _by_derivative(model: nn.Module, places: list[Place], ids_BT: Tensor, see: See) -> None:
    """The attention that a value gets is the derivative of what was attended to by it, which needs
    nothing of the way in which a model attends."""
    leaves: dict[int, Tensor] = {}

    def hold(place: Place, values_BTKD: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        leaves[place.layer] = values_BTKD.detach().requires_grad_()
        return leaves[place.layer]

    def weigh(place: Place, attended_BTC: Tensor) -> Tensor:
        leaf = leaves.pop(place.layer)
        (gradient,) = torch.autograd.grad(attended_BTC.sum(), leaf)
        torch.set_grad_enabled(False)
        see(place, leaf.detach(), gradient[..., 0])  # the same for all channels of a head
        if place is places[-1]:
            raise EnoughError
        return attended_BTC.detach()

    with torch.no_grad(), values(places, hold), attended(places, weigh):
        call(model, ids_BT)


def _by_shares(model: nn.Module, places: list[Place], ids_BT: Tensor, see: See) -> None:
    """The same in a fraction of the time, where the model attends by PyTorch's function."""
    held: list[Tensor] = []
    shares: list[Tensor] = []

    def hold(place: Place, values_BTKD: Tensor) -> None:
        held[:] = [values_BTKD]
        shares.clear()

    def weigh(place: Place, attended_BTC: Tensor) -> None:
        see(place, held[0], _per_value_head(shares[0], place))
        if place is places[-1]:
            raise EnoughError

    with (
        torch.no_grad(), values(places, hold), attended(places, weigh), Attending(shares.append),
    ):  # fmt: skip
        call(model, ids_BT)


class Regression:
    """Ridge regressions from normed embeddings, for any number of targets and ridges at once."""

    def __init__(self, embedding_NC: Tensor, weight_N: Tensor):
        """``weight_N``: what each id counts."""
        normed = F.rms_norm(embedding_NC.float(), (embedding_NC.shape[1],))
        features_NF = torch.cat((normed, torch.ones_like(normed[:, :1])), dim=1)
        self.weight_N1 = weight_N[:, None]
        gram_FF = (features_NF * self.weight_N1).double().T @ features_NF.double()
        self.eigenvalues_F, vectors_FF = torch.linalg.eigh(gram_FF)
        self.rotated_NF = (features_NF.double() @ vectors_FF).float()

    def fit(self, targets_NW: Tensor) -> Tensor:
        """What ridges are applied to, (F, W) fp64."""
        return self.rotated_NF.double().T @ (targets_NW * self.weight_N1).double()

    def predict(self, fitted_FW: Tensor, ridge: float, n_first: int) -> Tensor:
        """Predictions for the first keys, (n_first, W) fp32."""
        size = self.eigenvalues_F.mean()
        scaled = fitted_FW / (self.eigenvalues_F.clamp(min=0) + ridge * size)[:, None]
        return self.rotated_NF[:n_first] @ scaled.float()


def context_free_layers(model: nn.Module, places: list[Place], text: Text) -> set[int]:
    """Layers whose values of a token are the same in two different contexts."""
    device = next(model.parameters()).device
    n = min(64, text.calibration.ids.shape[1], len(text.vocabulary))
    order = torch.randperm(len(text.vocabulary), generator=torch.Generator().manual_seed(0))
    ids = text.vocabulary[order[:n]]
    rows = torch.stack((ids, ids.flip(0))).to(device)
    found = set()

    def see(place: Place, values_BTKD: Tensor) -> None:
        first, second = values_BTKD[0].float(), values_BTKD[1].flip(0).float()
        limit = SAME.get(values_BTKD.dtype, 0.02) * first.square().mean().sqrt()
        if n > 1 and float((first - second).abs().max()) <= limit:
            found.add(place.layer)

    with torch.no_grad(), values(places, see):
        call(model, rows)
    return found


def _exact(model: nn.Module, places: list[Place], text: Text) -> dict[int, Tensor]:
    """(N, K, D) of context-free layers, for all evaluated ids, seen in calibration or not."""
    device = next(model.parameters()).device
    found: dict[int, list[Tensor]] = {place.layer: [] for place in places}

    def see(place: Place, values_BTKD: Tensor) -> None:
        found[place.layer].append(values_BTKD[0].float().cpu())
        if place is places[-1]:
            raise EnoughError

    ids = text.vocabulary[: text.n_evaluated]
    with torch.no_grad(), values(places, see):
        for part in ids.split(text.calibration.ids.shape[1]):
            call(model, part[None].to(device))
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@dataclass(frozen=True)
class Candidate:
    """A way of making a table, but for its strength."""

    mean: Tensor
    """(N, K, D)."""
    count: Tensor
    """(N, K)."""
    towards: Tensor
    """(N, K, D)."""

    def __call__(self, keys: Tensor | slice, strength: float) -> Tensor:
        """(n mean + k towards) / (n + k) of some keys."""
        share = (self.count[keys] / (self.count[keys] + strength))[..., None]
        return torch.lerp(self.towards[keys], self.mean[keys], share)


class Calibration:
    """Makes the table of every layer.

    Args:
        model: in eval mode, its parameters without gradients.
        places: the values of its layers.
        text: what to calibrate and to choose on.
        settings: how many rows at once.
        state: keeps what is done.
    """

    def __init__(
        self, model: nn.Module, places: list[Place], text: Text, settings: ProbeSettings,
        state: State,
    ):  # fmt: skip
        self.model, self.places, self.text = model, places, text
        self.settings, self.state = settings, state
        self.device = next(model.parameters()).device
        n_key = len(text.vocabulary)
        counts = torch.bincount(text.calibration.keys.flatten(), minlength=n_key)
        self.counts_N = counts.to(self.device, torch.float32)
        self._regression: Regression | None = None

    @property
    def regression(self) -> Regression:
        """Made when first needed."""
        if self._regression is None:
            embedding = embedding_of(self.model)[self.text.vocabulary.to(self.device)]
            weight = self.counts_N / (self.counts_N + TYPE_WEIGHT)
            self._regression = Regression(embedding, weight)
        return self._regression

    def __call__(self, progress) -> dict[int, Table]:
        """The table of each layer; ``progress`` takes rows seen and rows in all."""
        free = context_free_layers(self.model, self.places, self.text)
        tables: dict[int, Table] = {}
        if known := [place for place in self.places if place.layer in free]:
            for layer, own in _exact(self.model, known, self.text).items():
                tables[layer] = Table(own, own, 0.0, False, True)
        learned = [place for place in self.places if place.layer not in free]
        for group in self._groups(learned):
            tables |= self._tables(group, progress)
        # A small table of a context-free layer falls back on regression like any other.
        for layer in free:
            tables[layer] = self._with_regression(tables[layer])
        return dict(sorted(tables.items()))

    def _groups(self, places: list[Place]) -> list[list[Place]]:
        """Layers whose sums fit into memory together; each group takes a pass over the text."""
        groups: list[list[Place]] = []
        left = 0.0
        for place in places:
            n_byte = 8.0 * len(self.text.vocabulary) * place.width
            if not groups or n_byte > left:
                groups.append([])
                left = self.settings.memory * 1e9
            groups[-1].append(place)
            left -= n_byte
        return groups

    def _with_regression(self, table: Table) -> Table:
        """Fitted on the rows of the table itself, which are exact."""
        n = self.text.n_evaluated
        targets = torch.zeros(len(self.counts_N), table.own[0].numel(), device=self.device)
        targets[:n] = table.own.flatten(1).to(self.device)
        weight = torch.zeros_like(self.counts_N)
        weight[:n] = self.counts_N[:n] / (self.counts_N[:n] + TYPE_WEIGHT)
        if not bool(weight.any()):
            return table
        embedding = embedding_of(self.model)[self.text.vocabulary.to(self.device)]
        regression = Regression(embedding, weight)
        said = regression.predict(regression.fit(targets), RIDGES[1], n)
        return Table(table.own, said.view_as(table.own).cpu(), 0.0, False, True)

    def _tables(self, group: list[Place], progress) -> dict[int, Table]:
        name = f"tables-{group[0].layer}-{group[-1].layer}"
        stored = self.state.tensors(name)
        if stored is None:
            sums = self._sums(group, progress)
            stored = self._choose(group, sums)
            self.state.keep(name, stored)
            self.state.drop("sums")
        return {
            place.layer: Table(
                stored[f"{place.layer}.own"], stored[f"{place.layer}.regression"],
                float(stored[f"{place.layer}.strength"]), bool(stored[f"{place.layer}.weighted"]),
                False,
            )
            for place in group
        }  # fmt: skip

    def _sums(self, group: list[Place], progress) -> dict[int, Sums]:
        rows, n_key = self.text.calibration, len(self.text.vocabulary)
        sums = {place.layer: Sums.empty(n_key, place, self.device) for place in group}
        done = 0
        kept = self.state.tensors("sums")
        if kept is not None and {f"{place.layer}.plain" for place in group} <= kept.keys():
            done = int(kept["done"])
            for layer, own in sums.items():
                for field in vars(own):
                    getattr(own, field).copy_(kept[f"{layer}.{field}"])
        every = max(1, len(rows) // SAVES)
        saved = done
        for n in collect(self.model, group, rows[done:], self.settings.batch_size, sums):
            progress(done + n, len(rows))
            if done + n - saved >= every:
                saved = done + n
                tensors = {"done": torch.tensor(saved)}
                for layer, own in sums.items():
                    tensors |= {f"{layer}.{field}": t.cpu() for field, t in vars(own).items()}
                self.state.keep("sums", tensors)
        return sums

    def _choose(self, group: list[Place], sums: dict[int, Sums]) -> dict[str, Tensor]:
        """The tables, with what is best on text that the sums have not seen."""
        n, choice = self.text.n_evaluated, self.text.choice
        seen = {place.layer: Sums.empty(n, place, self.device) for place in group}
        for _ in collect(self.model, group, choice, self.settings.batch_size, seen):
            pass
        n_seen = torch.bincount(choice.keys.flatten(), minlength=n).to(self.device)
        candidates: dict[int, list[Candidate]] = {}
        for place in group:
            own = sums.pop(place.layer)
            plain, weighted = (
                _means(own.plain, self.counts_N[:, None]),
                _means(own.weighted, own.attention),
            )
            fitted = self.regression.fit(plain.flatten(1))

            def error(ridge: float, fitted=fitted, layer=place.layer) -> float:
                said = self.regression.predict(fitted, ridge, n)
                product = (seen[layer].plain.flatten(1) * said).double().sum()
                square = (n_seen[:, None] * said.square()).double().sum()
                return float(square - 2 * product)

            ridge = min(RIDGES, key=error)
            said = [
                self.regression.predict(fitted, ridge, n).view_as(plain[:n]),
                self.regression.predict(self.regression.fit(weighted.flatten(1)), ridge, n).view_as(
                    plain[:n]
                ),
            ]
            # In tokens of the head's mean attention.
            mean_attention = own.attention.sum(0) / self.counts_N.sum()
            counts = (
                self.counts_N[:n, None].expand(-1, place.n_head),
                own.attention[:n] / mean_attention,
            )
            candidates[place.layer] = [
                Candidate(mean[:n].clone(), count, towards)
                for mean, count, towards in zip((plain, weighted), counts, said, strict=True)
            ]
        errors = self._errors(group, candidates)
        made: dict[str, Tensor] = {}
        for place in group:
            own = errors[place.layer]
            weighted, strength = min(own, key=own.get)
            chosen = candidates[place.layer][weighted]
            made |= {
                f"{place.layer}.own": chosen(slice(None), strength).cpu().contiguous(),
                f"{place.layer}.regression": chosen.towards.cpu().contiguous(),
                f"{place.layer}.strength": torch.tensor(strength),
                f"{place.layer}.weighted": torch.tensor(weighted),
            }
        return made

    def _errors(
        self, group: list[Place], candidates: dict[int, list[Candidate]]
    ) -> dict[int, dict[tuple[int, float], float]]:
        """Squared error of each layer's attention, its inputs unchanged, by (weighted, k)."""
        tried = [(weighted, k) for weighted in (0, 1) for k in STRENGTHS]
        errors = {layer: dict.fromkeys(tried, 0.0) for layer in candidates}
        keys = torch.empty(0)

        def see(place: Place, module: nn.Module, inputs: tuple, named: dict, out) -> None:
            right = _first(out).float()
            for weighted, k in tried:
                tried_BTKD = candidates[place.layer][weighted](keys, k)
                with values([place], lambda _, v, other=tried_BTKD: other):
                    found = _first(module.forward(*inputs, **named)).float()
                errors[place.layer][weighted, k] += float((found - right).double().square().sum())
            if place is group[-1]:
                raise EnoughError

        rows = self.text.choice[: self.settings.order_rows]
        with torch.no_grad(), after(group, "attention", see):
            for first in range(0, len(rows), self.settings.batch_size):
                batch = rows[first : first + self.settings.batch_size]
                keys = batch.keys.to(self.device)
                call(self.model, batch.ids.to(self.device))
        return errors


def _first(out) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _means(sums_NKD: Tensor, counts_NK: Tensor) -> Tensor:
    """Means where something was counted, else 0."""
    return sums_NKD / counts_NK.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
