"""The language model that lm-eval talks to: exact scores, no token computed twice.

The rows of one document (the choices of a question) share their longest common prefix: it is
computed once, and its cache is continued by every choice. Choices of one token need nothing more
than the prefix. Rows of all tasks are sorted by length and batched by a budget of tokens; the head
is applied at scored positions alone.

Every rank is given all requests, takes its share, and all get all results: that needs nothing of
lm-eval's own distribution, which fails with more ranks than rows. All ranks make equally many calls
of the model, as sharded parameters need.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from bov_lightning.distributed.ranks import Ranks
from bov_lightning.errors import UserError
from evaluation.backends import Backend
from evaluation.encoding import Row, crop
from evaluation.engine import Engine, origin
from evaluation.generation import generate
from evaluation.scorer import PromptInstance, Score

CACHE_PER_BUDGET = 4
"""Cached tokens per token of the budget, when choices continue their prefixes."""
MAX_LOGITS = 2**26
"""Elements of the fp32 logits that one forward may give."""
ROWS_PER_WAVE = 64
"""With a time limit, rows are scored in waves of so many per task, in their (shuffled) order."""


@dataclass
class Sequence:
    """A distinct row of a group."""

    row: Row
    requests: list[int]
    """Who asked for it."""
    origin: str = ""
    """Task and row, for messages."""
    logprob: float = 0.0
    is_greedy: bool = True


@dataclass
class Group:
    """The rows of one document."""

    task: str
    sequences: list[Sequence]
    shared: int
    """Tokens that are computed once for all; for a single row, all that are fed."""
    exact: bool = False
    """Whether the answers are `Score`s."""

    @property
    def continued(self) -> list[Sequence]:
        """The rows that need tokens after the shared ones."""
        return [s for s in self.sequences if len(s.row.ids) - 1 > self.shared]

    @property
    def first_position(self) -> int:
        """The first shared position whose logits count (the last one, if none does)."""
        return min(self.shared, *(s.row.start for s in self.sequences)) - 1


@dataclass
class Batch:
    """One forward over shared prefixes, then one per chunk of continuations."""

    groups: list[Group]
    chunks: list[list[tuple[int, Sequence]]]
    """(index into groups, row)."""

    @property
    def n_forward(self) -> int:
        """Calls of the model."""
        return 1 + len(self.chunks)


class BatchedLM(LM):
    """An lm-eval model over a `Backend`.

    Args:
        backend: the model.
        tokenizer: a ``transformers`` tokenizer.
        budget: tokens per forward pass; None: what suits the device.
        share_prefix: False computes every row on its own, for comparison.
        time_limit: seconds that a task may take before its remaining rows are left out.
        should_stop: asked on every rank after every forward; True on one stops all.
        progress: takes finished and total requests of this rank.
        ranks: the processes that share the rows.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Any,
        *,
        budget: int | None = None,
        share_prefix: bool = True,
        time_limit: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, total: None,
        ranks: Ranks | None = None,
    ):
        super().__init__()
        self.engine = Engine(backend, tokenizer, budget, should_stop, progress, ranks)
        self.backend, self.tokenizer, self.ranks = backend, tokenizer, self.engine.ranks
        self.budget, self.encoder = self.engine.budget, self.engine.encoder
        self.counts = self.engine.counts
        self._may_share = share_prefix
        self.time_limit = time_limit
        self.unscored: set[tuple[str, int]] = set()
        """(task, document) that a time limit left out."""
        self.seconds: dict[str, float] = {}
        """Time per task, the longest of all ranks."""
        self._device = backend.device
        self._finished = self._total = 0

    @property
    def share_prefix(self) -> bool:
        """Whether common prefixes are computed once."""
        return self._may_share and self.backend.shares_prefix

    # What lm-eval asks for beside the three kinds of requests.

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name or path."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt=True) -> str:
        """The tokenizer's own chat template."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list:
        """A `Score` for a `PromptInstance`, (logprob, is_greedy) for any other request."""
        by_document: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            # lm-eval numbers documents per task; without a number a request is on its own.
            key = (request.task_name, i if request.doc_id is None else request.doc_id)
            by_document.setdefault(key, []).append(i)
        documents = list(by_document.items())

        def encode(own: list[int]) -> list[Group]:
            members = [[requests[i] for i in documents[d][1]] for d in own]
            self.encoder.warm(m[0].prompts for m in members if isinstance(m[0], PromptInstance))
            return [g for d in own for g in self._groups(documents[d][1], requests)]

        sizes = [_size([requests[i] for i in indices]) for _, indices in documents]
        return self._score([key for key, _ in documents], sizes, encode, len(requests))

    @torch.no_grad()
    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context, in nats."""

        windows: dict[int, list[Group]] = {}

        def encode(own: list[int]) -> list[Group]:
            windows.update({d: self._windows(d, requests[d]) for d in own})
            return [g for d in own for g in windows[d]]

        for task in {r.task_name: None for r in requests}:
            if not any(r.args[0] for r in requests if r.task_name == task):
                raise UserError(f"task {task}: all of its texts are empty: nothing to score")
        keys = [(r.task_name, i if r.doc_id is None else r.doc_id) for i, r in enumerate(requests)]
        sizes = [len(r.args[0]) for r in requests]
        self._score(keys, sizes, encode, len(requests))
        nats: dict[int, float] = {}
        own_nats = {d: sum(g.sequences[0].logprob for g in gs) for d, gs in windows.items()}
        for part in self.ranks.gather(own_nats):
            nats.update(part)
        return [nats.get(i, -float("inf")) for i in range(len(requests))]

    def _windows(self, index: int, request: Instance) -> list[Group]:
        ids = self.encoder.encode(request.args[0]).tolist()
        bos, groups = int(self.encoder.bos[0]), []
        for window in get_rolling_token_windows(ids, bos, self.backend.max_length, 1):
            context, scored = make_disjoint_window(window)
            row = Row(np.array([*context, *scored], dtype=np.int32), len(context))
            self._check(row, origin(request))
            sequence = Sequence(row, [index], origin(request))
            groups.append(Group(request.task_name, [sequence], len(row.ids) - 1))
        return groups

    # Groups.

    def _groups(self, indices: list[int], requests: list[Instance]) -> list[Group]:
        first = requests[indices[0]]
        exact, where = isinstance(first, PromptInstance), origin(first)
        if exact:
            encoded = self.encoder.rows(first.prompts)
            rows = [encoded[requests[i].idx] for i in indices]
        else:
            rows = [self.encoder.pair(*requests[i].args) for i in indices]
        # The last token is not fed: lm-eval crops to what is, the reference of CORE to all.
        room = self.backend.max_length + (0 if exact else 1)
        sequences: dict[bytes, Sequence] = {}
        for i, row in zip(indices, rows, strict=True):
            self._check(row, where)
            cropped = crop(row, room)
            if cropped is not row:
                self._check(cropped, where, whole=row if not exact else None)
                self.counts.add_cropped(first.task_name)
            # Equal choices are scored once, so that they tie exactly.
            key = cropped.ids.tobytes() + cropped.start.to_bytes(4, "little")
            sequences.setdefault(key, Sequence(cropped, [], where)).requests.append(i)
        distinct = list(sequences.values())
        shared = self._shared(distinct)
        if shared:
            return [Group(first.task_name, distinct, shared, exact)]
        return [Group(first.task_name, [s], len(s.row.ids) - 1, exact) for s in distinct]

    def _check(self, row: Row, where: str, whole: Row | None = None) -> None:
        """Refuses a row that has nothing to score, or less of it than `whole`, or foreign tokens.

        An empty sum would be the best score there is.
        """
        n_token = len(row.ids) - row.start
        if n_token < 1:
            why = "its text adds no token to what stands before it"
            if self.backend.max_length < 2:
                why = f"the model sees {self.backend.max_length} token only"
            raise UserError(f"{where}: there is nothing to score, since {why}")
        if whole is not None and n_token < len(whole.ids) - whole.start:
            raise UserError(
                f"{where}: its continuation has {len(whole.ids) - whole.start} tokens, which a "
                f"context of {self.backend.max_length} cannot hold: leave the task out"
            )
        self.engine.check_vocabulary(row.ids, where)

    def _shared(self, sequences: list[Sequence]) -> int:
        """Tokens that all rows begin with and are fed; 0 where nothing is shared."""
        if len(sequences) == 1 or not self.share_prefix:
            return 0
        n = min(len(s.row.ids) for s in sequences) - 1
        head = sequences[0].row.ids[:n]
        same = np.ones(n, dtype=bool)
        for sequence in sequences[1:]:
            same &= head == sequence.row.ids[:n]
        return n if same.all() else int(same.argmin())

    # Batches.

    def _plan(self, groups: list[Group]) -> list[Batch]:
        """Batches within the budget, longest first, so that memory runs out at once or never."""
        batches: list[Batch] = []
        for continued in (False, True):
            members = [g for g in groups if bool(g.continued) == continued]
            members.sort(key=lambda g: -g.shared)
            batch: list[Group] = []
            for group in members:
                if batch and not self._fits(batch, group, continued):
                    batches.append(Batch(batch, self._chunks(batch)))
                    batch = []
                batch.append(group)
            if batch:
                batches.append(Batch(batch, self._chunks(batch)))
        return batches

    def _fits(self, batch: list[Group], group: Group, continued: bool) -> bool:
        if continued and self.backend.equal_prefixes and group.shared != batch[0].shared:
            return False
        n = len(batch) + 1
        n_position = max(g.shared - g.first_position for g in (*batch, group))
        return (
            n * batch[0].shared <= self.budget
            and n * n_position * self.backend.vocab_size <= MAX_LOGITS
        )

    def _chunks(self, groups: list[Group]) -> list[list[tuple[int, Sequence]]]:
        """The continuations of a batch; rows of one group stay in order."""
        width = groups[0].shared
        pending = [(i, s) for i, group in enumerate(groups) for s in group.continued]
        pending.sort(key=lambda pair: -len(pair[1].row.ids) + groups[pair[0]].shared)
        chunks: list[list[tuple[int, Sequence]]] = []
        for index, sequence in pending:
            if chunks:
                longest = len(chunks[-1][0][1].row.ids) - 1 - groups[chunks[-1][0][0]].shared
                n = len(chunks[-1]) + 1
                fits = n * (width + longest) <= CACHE_PER_BUDGET * self.budget
                if fits and n * longest * self.backend.vocab_size <= MAX_LOGITS:
                    chunks[-1].append((index, sequence))
                    continue
            chunks.append([(index, sequence)])
        return chunks

    def _forwards(self, batches: list[Batch]) -> Iterator[None]:
        """Computes the batches; yields after every call of the model."""
        for batch in batches:
            started = time.perf_counter()
            groups = batch.groups
            cache = None
            if batch.chunks:
                longest = max(len(s.row.ids) for g in groups for s in g.sequences)
                cache = self.backend.new_cache(len(groups), longest)
            ids = [g.sequences[0].row.ids[: g.shared] for g in groups]
            first = [g.first_position for g in groups]
            picks = _Picks()
            for i, group in enumerate(groups):
                for sequence in group.sequences:
                    end = min(group.shared, len(sequence.row.ids) - 1)
                    picks.add(i, sequence, sequence.row.start - 1, end, first[i])
            self._forward(ids, first, [g.shared for g in groups], picks, cache)
            yield
            for chunk in batch.chunks:
                branch = self.backend.branch(cache, [i for i, _ in chunk])
                ids, first, last, picks = [], [], [], _Picks()
                for slot, (i, sequence) in enumerate(chunk):
                    shared, row = groups[i].shared, sequence.row
                    ids.append(row.ids[shared:-1])
                    begin = max(row.start - 1, shared)
                    first.append(begin - shared)
                    last.append(len(row.ids) - 1 - shared)
                    picks.add(slot, sequence, begin, len(row.ids) - 1, begin)
                self._forward(ids, first, last, picks, branch)
                yield
            self._account(groups, time.perf_counter() - started)

    def _forward(
        self, ids: list[np.ndarray], first: list[int], last: list[int], picks: "_Picks", cache: Any
    ) -> None:
        """One call of the model; adds up what its logits say at positions first..last-1."""
        lengths = [len(i) for i in ids]
        padded = np.zeros((len(ids), max(lengths)), dtype=np.int64)
        n_position = max(1, *(b - a for a, b in zip(first, last, strict=True)))
        positions = np.zeros((len(ids), n_position), dtype=np.int64)
        for i, (row, a, b) in enumerate(zip(ids, first, last, strict=True)):
            padded[i, : len(row)] = row
            positions[i, : b - a] = np.arange(a, b)
        logits = self.backend(
            self.engine.tensor(padded), lengths, self.engine.tensor(positions), cache
        )
        picks.settle(logits)

    def _account(self, groups: list[Group], seconds: float) -> None:
        total = sum(g.shared for g in groups)
        for group in groups:
            spent = self.seconds.get(group.task, 0.0) + seconds * group.shared / total
            self.seconds[group.task] = spent

    # All ranks together.

    def _score(
        self,
        keys: list[tuple],
        sizes: list[int],
        encode: Callable[[list[int]], list[Group]],
        n: int,
    ) -> list:
        """Scores documents; the answers to all ``n`` requests, on every rank.

        Args:
            keys: task and number of every document.
            sizes: a measure of its length, to share the work evenly.
            encode: makes the groups of some documents.
            n: requests.
        """
        self.engine.prepare()
        tasks = list(dict.fromkeys(task for task, _ in keys))
        waves: dict[int, list[int]] = {}
        for d, (_, number) in enumerate(keys):
            waves.setdefault(number // ROWS_PER_WAVE if self.time_limit else 0, []).append(d)
        out_of_time: set[str] = set()
        answers: dict[int, tuple] = {}
        self._total, self._finished = len(range(self.ranks.rank, len(keys), self.ranks.size)), 0
        for wave in sorted(waves):
            late = [d for d in waves[wave] if keys[d][0] in out_of_time]
            self.unscored.update(keys[d] for d in late)
            due = sorted(set(waves[wave]) - set(late), key=lambda d: (-sizes[d], d))
            own = due[self.ranks.rank :: self.ranks.size]
            groups = self.ranks.together(lambda own=own: encode(own))
            batches = self._plan(groups)
            self._lockstep(self._forwards(batches), sum(b.n_forward for b in batches), len(own))
            answers.update(self._answers(groups))
            if self.time_limit:
                spent = self.ranks.maximum([self.seconds.get(task, 0.0) for task in tasks])
                out_of_time = {t for t, s in zip(tasks, spent, strict=True) if s > self.time_limit}
        everything: dict[int, tuple] = {}
        for part in self.ranks.gather(answers):
            everything.update(part)
        self._account_for_all(tasks)
        return [everything.get(i, (-float("inf"), False)) for i in range(n)]

    def _answers(self, groups: list[Group]) -> dict[int, tuple]:
        answers: dict[int, tuple] = {}
        for group in groups:
            for s in group.sequences:
                score: tuple = (s.logprob, s.is_greedy)
                if group.exact:
                    n_token = len(s.row.ids) - s.row.start
                    score = Score(*score, n_token, self.encoder.n_byte(s.row))
                answers.update(dict.fromkeys(s.requests, score))
        return answers

    def _account_for_all(self, tasks: list[str]) -> None:
        spent = self.ranks.maximum([self.seconds.get(task, 0.0) for task in tasks])
        self.seconds.update(zip(tasks, spent, strict=True))
        for task, _ in self.unscored:
            self.counts.unscored[task] = sum(t == task for t, _ in self.unscored)

    def _lockstep(self, steps: Iterator[None], n_step: int, n_document: int) -> None:
        """Takes all steps, each together with every other rank; idles where there are none left."""
        n_round = int(self.ranks.maximum([n_step])[0])
        before = self._finished
        for i in range(n_round):
            call = partial(next, steps) if i < n_step else self.engine.idle
            self.engine.in_lockstep(
                call, lambda: f"stopped after {self._finished} of {self._total} rows"
            )
            self._finished = before + round(n_document * (i + 1) / n_round)
            self.engine.progress(self._finished, self._total)
        next(steps, None)  # lets the last batch be accounted for

    # Generation.

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text up to a stop sequence, greedy unless the task asks for sampling."""
        self.engine.prepare()
        return generate(self.engine, requests)


class _Picks:
    """Which logits of one forward belong to which row."""

    def __init__(self):
        self.entries: list[tuple[int, Sequence, int, int, int]] = []

    def add(self, index: int, sequence: Sequence, begin: int, end: int, first: int) -> None:
        """Positions ``begin`` to ``end - 1`` of the row; ``first`` is the first that was kept."""
        if end > begin:
            self.entries.append((index, sequence, begin, end, first))

    def settle(self, logits_BPV: Tensor) -> None:
        """Adds log-probabilities to the rows."""
        if not self.entries:
            return
        where, slots, targets = [], [], []
        for index, sequence, begin, end, first in self.entries:
            where.append(np.full(end - begin, index))
            slots.append(np.arange(begin, end) - first)
            targets.append(sequence.row.ids[begin + 1 : end + 1].astype(np.int64))
        device = logits_BPV.device
        b, p, v = (torch.from_numpy(np.concatenate(x)).to(device) for x in (where, slots, targets))
        normaliser, best = logits_BPV.logsumexp(-1)[b, p], logits_BPV.argmax(-1)[b, p]
        nats = (logits_BPV[b, p, v] - normaliser).double().cpu().numpy()
        hits = (best == v).cpu().numpy()
        at = 0
        for _, sequence, begin, end, _ in self.entries:
            part = slice(at, at := at + end - begin)
            if not np.isfinite(nats[part]).all():
                raise UserError(
                    f"{sequence.origin}: a log-probability is {nats[part].min()}, so that the row "
                    "has no score: the logits of the model are not finite"
                )
            sequence.logprob += float(nats[part].sum())
            sequence.is_greedy &= bool(hits[part].all())


def _size(requests: list[Instance]) -> int:
    first = requests[0]
    if isinstance(first, PromptInstance):
        parts = (*first.prompts.blocks, *first.prompts.items)
        return sum(len(part) for part in parts)
    return sum(len(text) for request in requests for text in request.args)
