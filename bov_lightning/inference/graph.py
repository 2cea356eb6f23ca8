"""One more token of every row in tensors that keep shape and place: on CUDA, a captured graph.

A GPU is done with one token's kernels before Python has launched the next ones, so that launching
decides how many tokens a second come. Here positions are numbers on the device and every step reads
all the room there is, under a mask; so one step is captured (a CUDA graph) and replayed by a single
launch. On a CPU the same step runs without a graph.

Shapes: B batch, S slots of a window, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bov_lightning.errors import UserError
from bov_lightning.model.cache import Cache, Span, Store
from bov_lightning.model.offload import moved
from bov_lightning.model.transformer import Transformer


class FixedStep:
    """What `Step` says of one new token per row, as tensors that are there before and after it."""

    n_token, uniform = 1, False

    def __init__(self, lengths_B: Tensor, advances_B: Tensor, max_context: int):
        """``advances_B``: bool, False at rows that get no token; their room may be full."""
        self.device, self.advances_B = lengths_B.device, advances_B
        self.positions_BT = lengths_B.clamp(max=max_context - 1)[:, None]

    def last_of(self, before: Tensor, new: Tensor) -> Tensor:
        """As `Step.last_of`; rows that get no token keep what they had."""
        advances = self.advances_B.view(-1, *[1] * (new.dim() - 1))
        return torch.where(advances, torch.cat((before, new), dim=1)[:, 1:], before)


class FixedSpan(Span):
    """A window whose slots are all read at every step; the mask hides what they do not hold."""

    def begin(self, step: FixedStep, numbers: dict[str, Tensor]) -> None:
        """Lays out one step; how far the texts are changes nothing but numbers on the device."""
        self.step, self._numbers, self._numbers_of_keys = step, numbers, {}
        self.joins, self.wraps = False, self.capacity == self.reach + 1
        self.n_read = self.capacity
        # Where each row's new token goes, once for all that is kept of the window.
        self._slots_B = step.positions_BT[:, 0] % self.capacity
        self._rows_B = torch.arange(len(self._slots_B), device=step.device)
        for name in ("key_positions", "mask"):
            self.__dict__.pop(name, None)

    def _positions_of_slots(self) -> Tensor:
        slots_1S = torch.arange(self.n_read, device=self.step.device)[None]
        last_B1 = self.step.positions_BT
        return last_B1 - (last_B1 - slots_1S) % self.capacity if self.wraps else slots_1S

    def write(self, kept_BKSD: Tensor, x_BTKD: Tensor) -> None:
        """Puts each row's new token into its slot; a row that gets none keeps what is there."""
        rows_B, slots_B = self._rows_B, self._slots_B
        new_BKD = x_BTKD[:, 0].to(kept_BKSD.dtype)
        advances = self.step.advances_B[:, None, None]
        kept_BKSD[rows_B, :, slots_B] = torch.where(
            advances, new_BKD, kept_BKSD[rows_B, :, slots_B]
        )


class FixedCache(Cache):
    """Another cache's room, read and written by fixed steps."""

    state = ("lengths", "previous_B1C", "previous_ids_BR", "_count_B1")
    """What a step of any cache replaces by new tensors. Here it stays where it is."""

    def __init__(self, past: Cache):
        """``past``: what is kept stays there; only its state is doubled."""
        self.past = past
        super().__init__(
            past.config, past._blocks, past.batch_size, past.max_context, past.dtype, past.device
        )
        self.advances = torch.ones(past.batch_size, dtype=torch.bool, device=past.device)
        self._own = {name: x for name in self.state if (x := getattr(self, name)) is not None}

    def span(self, window: int | None) -> Span:
        """As `Cache.span`."""
        return self._spans.setdefault(window, FixedSpan(window, self.max_context))

    def new_store(self, span: Span) -> Store:
        """The past's store: the same values ask for the same ones, in the same order."""
        self.stores.append(Store(span, self.past.stores[len(self.stores)].kept))
        return self.stores[-1]

    def keep_numbers(self, name: str, dtype: torch.dtype, each: tuple[int, ...] = ()) -> None:
        """The past's numbers."""
        self._numbers[name] = self.past._numbers[name]

    def begin(self, token_ids_BT: Tensor, lengths: None, starts_BT: Tensor | None) -> Tensor:
        """Starts a step; returns the positions of the new tokens, (B, 1)."""
        step = FixedStep(self.lengths, self.advances, self.max_context)
        self._lay_out(step, token_ids_BT, starts_BT)
        return step.positions_BT

    def finish(self) -> None:
        """Counts the step's tokens, on the device."""
        self.lengths = self.lengths + self.advances
        for name, own in self._own.items():
            if getattr(self, name) is not own:
                own.copy_(getattr(self, name))
                setattr(self, name, own)
        for store in self.stores:
            store.release()

    def take_over(self) -> None:
        """Goes on from where other steps have left the past."""
        for name, own in self._own.items():
            if getattr(self.past, name) is not own:
                own.copy_(getattr(self.past, name))
                setattr(self.past, name, own)


class StaticStep:
    """Steps of one new token per row, for a cache that any other steps may have filled.

    On CUDA it is captured when it is made, and every call replays it: with the weights that the
    model has there. The cache stays usable as ever, in between and afterwards.

    Args:
        model: in eval mode, on the cache's device.
        cache: from `Transformer.new_cache`; see `fits`.
        then: what is computed of the logits (B, V) in the same graph, and returned instead; None:
            the logits.
    """

    def __init__(
        self, model: Transformer, cache: Cache, then: Callable[[Tensor], Tensor] | None = None
    ):
        if reason := why_not_static(cache):
            raise UserError(f"no static step: {reason}")
        self.model, self.cache, self.then = model, cache, then
        # Changed in place later on, within inference mode and outside.
        with torch.inference_mode(False):
            self._fixed = FixedCache(cache)
            self._ids_B1 = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=cache.device)
        self._advances = [True] * cache.batch_size
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None
        if cache.device.type == "cuda":
            with torch.no_grad(), torch.cuda.device(cache.device):
                self._capture()

    @torch.no_grad()
    def __call__(self, token_ids_B1: Tensor, advances: list[bool] | None = None) -> Tensor:
        """The logits (B, V) after one more token of each row, or what ``then`` makes of them.

        On CUDA the next call writes into the same tensor.

        Args:
            token_ids_B1: int64; on the CPU, or where the cache is.
            advances: False at rows that get no token, and whose logits mean nothing; None: all do.

        Raises:
            UserError: no room left, ids beyond the vocabulary, another batch size.
        """
        cache, fixed = self.cache, self._fixed
        advances = [True] * cache.batch_size if advances is None else list(advances)
        after = self._checked(token_ids_B1, advances)
        fixed.take_over()
        self._ids_B1.copy_(moved(token_ids_B1, cache.device))
        if advances != self._advances:
            self._set_advances(advances)
        if self._graph is None:
            result = self._compute()
        else:
            self._graph.replay()
            result = self._result
        cache._lengths = after
        return result

    def _checked(self, token_ids_B1: Tensor, advances: list[bool]) -> list[int]:
        """How many tokens each row has afterwards."""
        cache = self.cache
        if tuple(token_ids_B1.shape) != (cache.batch_size, 1) or len(advances) != cache.batch_size:
            raise UserError(
                f"the cache holds {cache.batch_size} rows: give one token of each, not "
                f"{tuple(token_ids_B1.shape)}"
            )
        after = [old + new for old, new in zip(cache._lengths, advances, strict=True)]
        if max(after) > cache.max_context:
            raise UserError(
                f"{max(after)} tokens do not fit into a context of {cache.max_context}: give less "
                "text or a larger max_context"
            )
        if token_ids_B1.device.type == "cpu":
            cache.check_ids(token_ids_B1)
        return after

    def _set_advances(self, advances: list[bool]) -> None:
        self._fixed.advances.copy_(moved(torch.tensor(advances), self.cache.device))
        self._advances = advances

    def _compute(self) -> Tensor:
        logits_BV = self.model(self._ids_B1, cache=self._fixed)[:, -1]
        return logits_BV if self.then is None else self.then(logits_BV)

    def _capture(self) -> None:
        """Captures a step in which no row advances, so that trying it out changes nothing."""
        self._set_advances([False] * self.cache.batch_size)
        current = torch.cuda.current_stream(self.cache.device)
        # Once before: kernels are compiled, and libraries make room for themselves.
        stream = torch.cuda.Stream(self.cache.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._compute()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._result = self._compute()
        except RuntimeError as error:
            source = self.cache.config.value.source
            reason, *_ = str(error).split("\n")
            raise UserError(
                f"the step cannot be captured as a CUDA graph ({reason}): a "
                f"value source that waits for the device says capturable = False (here: {source})"
            ) from error
        self._graph = graph


class StaticSteps:
    """Static steps by batch size: what was captured for one batch serves the next of its size."""

    unit = 512
    """Rooms are multiples of it, so that a slightly longer text fits as well."""

    def __init__(self, model: Transformer):
        self.model = model
        self._steps: dict[tuple, StaticStep] = {}

    def take(
        self, batch_size: int, room: int, then: Callable[[Tensor], Tensor] | None
    ) -> StaticStep:
        """A step whose cache is empty and has at least that room; `StaticStep` on the rest.

        It is the one that was taken before for this batch size, whose texts are forgotten.
        """
        key = batch_size, then
        if key in self._steps and self._steps[key].cache.max_context < room:
            del self._steps[key]
        if key in self._steps:
            self._steps[key].cache.clear()
        else:
            cache = self.model.new_cache(batch_size, -(-room // self.unit) * self.unit)
            self._steps[key] = StaticStep(self.model, cache, then)
        return self._steps[key]


def why_not_static(cache: Cache) -> str:
    """Why a `StaticStep` cannot serve this cache; empty where it can."""
    values = [block.attention.value for block in cache._blocks]
    if any(value.on_host for value in values):
        return "value tables lie on the host (bank_device), which hands over rows at every step"
    if not all(value.capturable for value in values):
        return f"value.source {cache.config.value.source} says that it is not capturable"
    if cache.device.type == "cuda":
        from bov_lightning.model.kernels import triton

        if triton is None:
            return "Triton is not installed, without which reading a bank waits for the device"
    return ""


def pays_static(cache: Cache) -> bool:
    """Whether a `StaticStep` is the faster way: a CPU would read room that holds nothing yet."""
    return cache.device.type == "cuda" and not why_not_static(cache)
