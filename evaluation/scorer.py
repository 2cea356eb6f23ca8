"""The scoring of CORE, as one lm-eval task class; the YAML files in `tasks/` say what differs.

A prompt is built from blocks (few-shot examples, each ended by a blank line) and the item itself.
Our own language model (`evaluation.lm`) is handed these parts and scores exactly the tokens that
the paper's authors score. Any other lm-eval model gets the usual pair (context, continuation), cut
where the choices' texts part ways.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig

from bov_lightning.errors import UserError
from evaluation.data import read_rows
from evaluation.encoding import Encoder, Prompts

SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234
"""Row i draws its examples with this plus i."""


class Score(NamedTuple):
    """The scored tokens of one prompt."""

    logprob: float
    """Summed, in nats."""
    is_greedy: bool
    """Whether each of them is the likeliest one."""
    n_token: int
    n_byte: int
    """UTF-8 bytes of the text that they decode to."""


@dataclass
class PromptInstance(Instance):
    """A request that knows the row's prompts; ``idx`` is the choice."""

    prompts: Prompts = field(default=None, kw_only=True, repr=False)


def common_prefix(texts: list[str]) -> int:
    """How many characters all texts begin with."""
    shortest, longest = min(texts), max(texts)  # by order: what these two share, all share
    same = (a == b for a, b in zip(shortest, longest, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), min(map(len, texts)))


def _word_start(text: str, end: int) -> int:
    """The last position up to ``end`` at which whitespace begins: where tokens may be cut."""
    while end > 0 and not (text[end : end + 1].isspace() and not text[end - 1].isspace()):
        end -= 1
    return end


class CoreTask(Task):
    """One CORE task; ``config`` is what its YAML file holds.

    Keys of ``config["metadata"]``: ``kind``, ``delimiter``, ``baseline`` {v1, v2}, ``file``,
    ``sha256``, ``directory`` (which of the next keys names its directory). From
    ``TaskManager(metadata=...)`` or ``lm_eval --metadata``: ``data_dir``, ``heldout_dir``,
    ``max_per_task`` and the tokenizer's name (``tokenizer`` or ``pretrained``).
    """

    VERSION = 1.0
    OUTPUT_TYPE = "loglikelihood"

    def __init__(self, config: dict[str, Any]):
        metadata = config["metadata"]
        self._config = TaskConfig(
            task=config["task"],
            task_alias=config.get("task_alias"),
            num_fewshot=config["num_fewshot"],
            output_type=self.OUTPUT_TYPE,
            target_delimiter=metadata["delimiter"],
            metadata=metadata,
        )
        self.kind, self.delimiter = metadata["kind"], metadata["delimiter"]
        self.baseline = metadata["baseline"]
        self._instances = None
        self._measures: dict[int, list[tuple[int, int]]] = {}
        self._encoder: Encoder | None = None
        if name := metadata.get("tokenizer") or metadata.get("pretrained"):
            from transformers import AutoTokenizer

            self._encoder = Encoder(AutoTokenizer.from_pretrained(name))
        directory = metadata.get(metadata.get("directory", "data_dir"))
        if "directory" in metadata and directory is None:
            raise UserError(
                f"{config['task']} is made of a run's held-out documents: evaluate a run with it"
            )
        rows = read_rows(directory, metadata["file"], metadata.get("sha256"))
        if not rows:
            raise UserError(f"{config['task']}: {metadata['file']} has no rows to score")
        random.Random(SHUFFLE_SEED).shuffle(rows)
        limit = metadata.get("max_per_task")
        if limit is not None and int(limit) < 1:
            raise UserError(f"max_per_task is {limit}: at least 1")
        self.n_total = len(rows)
        self._docs = [{"index": i, **row} for i, row in enumerate(rows[: limit and int(limit)])]
        self.n_shot = min(config["num_fewshot"], len(self._docs) - 1)
        self._filters = _take_first()

    def download(self, *args, **kwargs) -> None:
        """Nothing: the rows are read from the data directory."""

    def has_training_docs(self) -> bool:
        """False."""
        return False

    def has_validation_docs(self) -> bool:
        """False."""
        return False

    def has_test_docs(self) -> bool:
        """True."""
        return True

    def test_docs(self) -> list[dict]:
        """The rows, shuffled and cut."""
        return self._docs

    def doc_to_text(self, doc: dict) -> str:
        """The item without its answer."""
        return self._items(doc)[0]

    def doc_to_target(self, doc: dict) -> str | int:
        """The continuation, or the index of the right choice."""
        return doc["continuation"] if self.kind == "language_modeling" else doc["gold"]

    def _example(self, doc: dict) -> str:
        """A row as a few-shot example, with the right answer."""
        if self.kind == "multiple_choice":
            return doc["query"] + self.delimiter + doc["choices"][doc["gold"]]
        if self.kind == "schema":
            return doc["context_options"][doc["gold"]] + self.delimiter + doc["continuation"]
        return doc["context"].strip() + self.delimiter + doc["continuation"]

    def _items(self, doc: dict) -> tuple[str, ...]:
        if self.kind == "multiple_choice":
            return tuple(doc["query"] + self.delimiter + choice for choice in doc["choices"])
        if self.kind == "schema":
            after = self.delimiter + doc["continuation"]
            return tuple(context + after for context in doc["context_options"])
        before = doc["context"].strip() + self.delimiter
        return before.rstrip(), before + doc["continuation"]

    def prompts(self, doc: dict) -> Prompts:
        """The prompts of a row, with few-shot examples drawn as the authors draw them."""
        own = doc["index"]
        # A sample of all indices but one's own, without making that list for every row.
        drawn = random.Random(FEWSHOT_SEED + own).sample(range(len(self._docs) - 1), self.n_shot)
        examples = (self._docs[i + (i >= own)] for i in drawn)
        blocks = tuple(self._example(example) + "\n\n" for example in examples)
        return Prompts(self.kind, blocks, self._items(doc))

    def build_all_requests(
        self, *, limit: int | None = None, rank: int = 0, world_size: int = 1, **kwargs
    ) -> None:
        """The requests of this rank's rows."""
        self._instances = [
            instance
            for doc_id, doc in self.doc_iterator(rank=rank, limit=limit, world_size=world_size)
            for instance in self.construct_requests(doc, doc_id)
        ]

    def construct_requests(self, doc: dict, doc_id: int, **kwargs) -> list[PromptInstance]:
        """One request per choice, or one for the continuation."""
        prompts = self.prompts(doc)
        head = "".join(prompts.blocks)
        pairs = [(head + before, after) for before, after in self._pairs(prompts)]
        if self._encoder is not None:
            pairs = self._exact_pairs(prompts, pairs)
        self._measures[doc["index"]] = [(len(after.encode()), 0) for _, after in pairs]
        if self._encoder is not None:
            rows = self._encoder.rows(prompts)
            counts = [(self._encoder.n_byte(row), len(row.ids) - row.start) for row in rows]
            self._measures[doc["index"]] = counts
        contexts: dict[str, str] = {}  # one object for all choices
        return [
            PromptInstance(
                request_type="loglikelihood",
                doc=doc,
                arguments=(contexts.setdefault(context, context), continuation),
                idx=i,
                metadata=(self.config.task, doc_id, 1),
                prompts=prompts,
            )
            for i, (context, continuation) in enumerate(pairs)
        ]

    def _pairs(self, prompts: Prompts) -> list[tuple[str, str]]:
        """Every item, cut into context and continuation without knowing the tokenizer."""
        items = prompts.items
        if self.kind == "language_modeling":
            without, with_ = items
            return [(without, with_[len(without) :])]
        if self.kind == "schema":
            shared = common_prefix([item[::-1] for item in items])
            pairs = []
            for item in items:
                start = len(item) - shared
                while start < len(item) and not item[start].isspace():
                    start += 1
                pairs.append((item[:start], item[start:]))
            return pairs
        start = _word_start(items[0], common_prefix(list(items)))
        return [(item[:start], item[start:]) for item in items]

    def _exact_pairs(
        self, prompts: Prompts, inexact: list[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """Texts that another model of this tokenizer cuts at the very token, BOS in front."""
        decode = partial(self._encoder.tokenizer.decode, clean_up_tokenization_spaces=False)
        bos = decode(self._encoder.bos.tolist())
        pairs = []
        for row, (before, after) in zip(self._encoder.rows(prompts), inexact, strict=True):
            # Without BOS, behind which some decoders keep the space that starts every text.
            whole = decode(row.ids[1:].tolist())
            context = decode(row.ids[1 : row.start].tolist())
            # A character whose bytes lie in tokens on both sides cannot be cut.
            if whole == before + after and whole.startswith(context):
                before, after = context, whole[len(context) :]
            pairs.append((bos + before, after))
        return pairs

    def process_results(self, doc: dict, results: list) -> dict[str, float]:
        """Whether the row is right, and that centred on the baseline, under every protocol.

        ``results`` holds a `Score` per choice, or the (logprob, is_greedy) of another model, which
        gives no token counts: its continuation's text is measured then.
        """
        if self.kind == "language_modeling":
            correct = by_token = float(results[0][1])
        else:
            n_byte, n_token = zip(*self._counts(doc, results), strict=True)
            correct = float(_argmin(results, n_byte) == doc["gold"])
            by_token = float(_argmin(results, n_token) == doc["gold"]) if any(n_token) else None
        metrics = {"acc": correct, "centered": self._centred(correct, "v1")}
        if by_token is not None:
            metrics["acc_token"] = by_token
            for version in ("v1", "v2"):
                metrics[f"centered_dclm_{version}"] = self._centred(by_token, version)
        return metrics

    def _counts(self, doc: dict, results: list) -> list[tuple[int, int]]:
        """Bytes and tokens (0: not known) of every choice."""
        if all(isinstance(result, Score) for result in results):
            return [(result.n_byte, result.n_token) for result in results]
        return self._measures[doc["index"]]

    def _centred(self, correct: float, version: str) -> float:
        baseline = self.baseline[version]
        return (correct - baseline) / (1 - baseline)

    def aggregation(self) -> dict[str, Callable]:
        """Means; the mean of centred rows is the centred accuracy."""
        names = ("acc", "centered", "acc_token", "centered_dclm_v1", "centered_dclm_v2")
        return dict.fromkeys(names, mean)

    def higher_is_better(self) -> dict[str, bool]:
        """All of them."""
        return dict.fromkeys(self.aggregation(), True)


def _argmin(results: list, counts: Sequence[int]) -> int:
    """The choice of the lowest nats per unit, the first of several; none where nothing counts."""
    costs = [
        -result[0] / count if count else float("inf")
        for result, count in zip(results, counts, strict=True)
    ]
    return min(range(len(costs)), key=costs.__getitem__)


def _take_first() -> list:
    from lm_eval.filters import build_filter_ensemble

    return [build_filter_ensemble("none", [["take_first", None]])]
