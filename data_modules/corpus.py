"""A tokenized corpus on disk: a tokenizer and shards of packed rows.

    directory/
        settings.json                   what decides the rows; written first
        tokenizer/                      a transformers tokenizer
        train-00003-of-00016.bin        rows of sequence_len + 1 token ids, uint16 or uint32
        train-00003-of-00016.json       its rows, tokens, checksum; written after it
        manifest.json                   all of these together; written when every shard is there

A shard is packed from its own stripe of the source. So its content follows from the settings alone:
any number of processes and machines writes the same files, and may be killed at any time.
"""

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from bov_lightning import claims
from bov_lightning.console import CONSOLE, say
from bov_lightning.distributed import preemption
from bov_lightning.errors import UserError
from bov_lightning.files import file_error, write_directory, write_file
from data_modules.encoding import Ranks, UnsuitedError, document_encoder, ranks_of
from data_modules.lossless import ByteCount
from data_modules.packing import PackingConfig, PackingCounts, pack
from data_modules.reader import OnError, open_stripe
from data_modules.sources import Split, TextSource
from data_modules.tokenizer import (
    TokenizerConfig,
    decide,
    encode_documents,
    identity,
    read_tokenizer,
    save_tokenizer,
    token_dtype,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)

MANIFEST = "manifest.json"
SETTINGS = "settings.json"
SPLITS: tuple[Split, ...] = ("train", "val")
REPORT_EVERY_ROWS = 500
LINES_EVERY_S = 30.0
"""Seconds between two lines of progress where the output is no terminal."""

_shared: tuple = ()
"""In a worker: (fraction, tokens) per shard, and how many shards are taken."""


def _start_worker(progress: Any, taken: Any, directory: Path) -> None:
    """Prepares what takes time, while the process that starts workers does the same."""
    global _shared
    _shared = (progress, taken)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    packing_tokenizer(directory)


def _is_there() -> None:
    """A task that does nothing but have a worker started."""


def _stop_if_told() -> None:
    """Ends a process that was told to stop: what is packed already is kept."""
    if code := preemption.received():
        raise preemption.Preempted(code)


def _until_told(documents: Iterable[str]) -> Iterator[str]:
    """The documents, until this process is told to stop."""
    for document in documents:
        _stop_if_told()
        yield document


class Corpus:
    """Prepares the shards of a corpus, and knows what they hold."""

    def __init__(
        self,
        directory: str | Path,
        source: TextSource,
        tokenizer: TokenizerConfig = TokenizerConfig(),
        packing: PackingConfig = PackingConfig(),
        sequence_len: int = 2048,
        n_shard: int = 16,
        on_error: OnError = "error",
        splits: tuple[Split, ...] = SPLITS,
    ):
        """
        Args:
            directory: where everything lies.
            source: the documents.
            tokenizer: trained on the training documents, or brought along.
            packing: how documents fill rows.
            sequence_len: tokens per row, less the one that rows have more.
            n_shard: shards of the training split; the validation split is one.
            on_error: what an unreadable row does.
            splits: which splits to pack.
        """
        if n_shard < 1:
            raise UserError(f"data: n_shard is {n_shard}: at least 1")
        self.directory, self.source, self.tokenizer = Path(directory), source, tokenizer
        self.packing, self.sequence_len, self.n_shard = packing, sequence_len, n_shard
        self.on_error, self.splits = on_error, splits

    @property
    def tokenizer_directory(self) -> Path:
        """The tokenizer, as ``transformers`` reads it."""
        return self.directory / "tokenizer"

    def settings(self, fingerprint: str | None = None) -> dict[str, Any]:
        """Everything that decides what the rows are; the source's fingerprint is taken if given."""
        return {
            "source": type(self.source).__name__,
            "fingerprint": fingerprint or self.source.fingerprint(),
            "tokenizer": identity(self.tokenizer),
            "packing": asdict(self.packing),
            "sequence_len": self.sequence_len,
            "n_shard": self.n_shard,
            "on_error": self.on_error,
            "splits": list(self.splits),
        }

    def shards(self) -> list[tuple[Split, int, int]]:
        """(split, index, number of shards of the split) of every shard."""
        counts = {"train": self.n_shard, "val": 1}
        return [(split, i, counts[split]) for split in self.splits for i in range(counts[split])]

    def prepare(self, processes: int | None = None, shard: tuple[int, int] = (0, 1)) -> None:
        """Makes what is missing.

        Args:
            processes: how many pack at once; None: one per core.
            shard: (i, n): this machine packs every n-th shard from the i-th on. The one that ends
                last writes the manifest; the one that begins first trains the tokenizer.
        """
        with self._alone(f"part {shard[0]} of {shard[1]}"):
            self._claim()
            self.say_what_is_shared()
            with self._alone("the tokenizer"):
                self._make_tokenizer()
            mine = [s for i, s in enumerate(self.shards()) if i % shard[1] == shard[0]]
            pending = [s for s in mine if not self._is_whole(*s)]
            pending.sort(key=lambda s: s[0] == "train")  # what may be refused comes first
            if pending:
                self._pack(pending, processes or os.cpu_count() or 1)
            self._finish()

    @contextmanager
    def _alone(self, part: str) -> Iterator[None]:
        """While no other process makes that part; one that does is waited for while it lives."""
        said = False

        def waiting(owner: dict[str, Any], is_certain: bool) -> bool:
            nonlocal said
            if not said:
                said = True
                CONSOLE.print(
                    f"{self.directory}: {claims.describe(owner)} makes {part}: waiting for it",
                    highlight=False, soft_wrap=True,
                )  # fmt: skip
            return True

        made = [x for x in (self.directory, *self.directory.parents) if not x.exists()]
        name = f".{part.replace(' ', '-')}"
        try:
            claim = claims.wait_and_take(
                self.directory, name, go_on=waiting, stop=lambda: preemption.received() != 0
            )
        except OSError as error:
            raise file_error(error, self.directory) from error
        if claim is None:
            raise preemption.Preempted(preemption.received())
        try:
            with claim:
                yield
        finally:
            # Nothing is left of what was refused.
            for path in made:
                with suppress(OSError):
                    path.rmdir()

    def _finish(self) -> None:
        """Writes the manifest, if this was the last part."""
        if all(self._shard_file(*s, ".json").is_file() for s in self.shards()):
            self._write_manifest()

    def is_prepared(self) -> bool:
        """Whether the directory holds just this corpus; another one is a `UserError`.

        The text itself need not be there any more: compute nodes may see neither disk nor network
        that it came from.
        """
        if not (self.directory / MANIFEST).is_file():
            return False
        try:
            fingerprint = self.source.fingerprint()
        except (UserError, OSError) as error:
            fingerprint = _read_json(self.directory / SETTINGS).get("fingerprint")
            say(f"using {self.directory} as it is, since its text cannot be compared: {error}")
        self._compare(self.settings(fingerprint))
        return True

    def say_what_is_shared(self) -> None:
        """Says it where text is read for training and for validation, by whatever name."""
        try:
            train, val = (self.source.origins(split) for split in SPLITS)
        except (UserError, OSError):
            return  # The text need not be there any more.
        shared = [name for key, name in val.items() if key in train]
        if shared:
            more = f" (and {len(shared) - 1} more)" if len(shared) > 1 else ""
            say(
                f"data: {shared[0]}{more} is read for validation and for training: val_bpb then "
                "measures text that was trained on"
            )

    def _claim(self) -> None:
        """Writes settings.json, or compares it with ours."""
        path, own = self.directory / SETTINGS, self.settings()
        if not path.is_file():
            if any(not path.name.startswith(".") for path in self.directory.iterdir()):
                raise UserError(
                    f"{self.directory} exists and holds no corpus: choose another folder"
                )
            for split in self.splits:
                first = next(iter(open_stripe(self.source, split, on_error=self.on_error)), None)
                if first is None:
                    raise UserError(f"data: the corpus is empty: no {split} document has any text")
            write_file(path, json.dumps(own, indent=1) + "\n")
        self._compare(own)

    def _compare(self, own: dict[str, Any]) -> None:
        """Refuses to mix two settings in one directory."""
        found = _read_json(self.directory / SETTINGS)
        for name, value in own.items():
            # Whether a row that cannot be read ends the reading makes no difference to the others.
            if name == "on_error":
                continue
            if found.get(name) != value:
                raise UserError(
                    f"{self.directory} was prepared with {name} {found.get(name)}, not {value}: "
                    "choose another data.init_args.directory or delete it"
                )

    def _make_tokenizer(self) -> None:
        if self.tokenizer_directory.is_dir():
            return
        names = None
        if self.tokenizer.path:
            found = decide(self.tokenizer.path, self.tokenizer.start)
            tokenizer, names = found.tokenizer(), found.names
            left_out = f"; left out: {', '.join(found.left_out)}" if found.left_out else ""
            CONSOLE.print(
                f"tokenizer {self.tokenizer.path}: documents start with {found.start}{left_out}",
                highlight=False, soft_wrap=True, markup=False,
            )  # fmt: skip
        else:
            with CONSOLE.status("training the tokenizer"):
                documents = open_stripe(self.source, "train", on_error=self.on_error)
                tokenizer = train_tokenizer(_until_told(documents), self.tokenizer)
        write_directory(
            self.tokenizer_directory, lambda aside: save_tokenizer(tokenizer, aside, names)
        )

    def _shard_file(self, split: Split, index: int, n_shard: int, suffix: str) -> Path:
        return self.directory / f"{split}-{index:05d}-of-{n_shard:05d}{suffix}"

    def _is_whole(self, split: Split, index: int, n_shard: int) -> bool:
        """Whether the shard is there with its checksum; a damaged one is packed again."""
        description = self._shard_file(split, index, n_shard, ".json")
        data = self._shard_file(split, index, n_shard, ".bin")
        if not (description.is_file() and data.is_file()):
            return False
        return _read_json(description)["sha256"] == _sha256(data)

    def _pack(self, pending: list, processes: int) -> None:
        columns = (
            TextColumn("packing"), BarColumn(bar_width=30), TextColumn("{task.percentage:.0f}%"),
            TextColumn("{task.fields[rate]}"), TextColumn("ETA"), TimeRemainingColumn(),
        )  # fmt: skip
        processes = min(processes, len(pending))
        context = multiprocessing.get_context("spawn")
        shared = context.Array("d", 2 * len(pending), lock=False)
        started = said = time.monotonic()

        def show(progress: Progress, task: Any) -> None:
            nonlocal said
            _stop_if_told()
            now, done = time.monotonic(), sum(shared[0::2])
            rate = f"{sum(shared[1::2]) / (now - started):,.0f} tokens/s"
            progress.update(task, completed=done, rate=rate)
            if not CONSOLE.is_terminal and now - said > LINES_EVERY_S:
                said = now
                left = (len(pending) / done - 1) * (now - started) / 60 if done else float("nan")
                line = f"packing {done:.1f} of {len(pending)} shards  {rate}  ETA {left:.1f} min"
                CONSOLE.print(line, highlight=False)

        on_screen = CONSOLE.is_terminal
        with Progress(*columns, console=CONSOLE, transient=True, disable=not on_screen) as progress:
            task = progress.add_task("pack", total=len(pending), rate="")
            taken = context.Value("q", 0)
            if processes == 1:
                ranks = _ranks(self.tokenizer_directory)
                self._pack_what_is_left(
                    pending, ranks, (shared, taken), lambda: show(progress, task)
                )
                return
            # This process packs too, since it need not start first.
            pool = ProcessPoolExecutor(
                processes - 1, context, _start_worker, (shared, taken, self.tokenizer_directory)
            )
            try:
                for _ in range(processes - 1):
                    pool.submit(_is_there)
                ranks = _ranks(self.tokenizer_directory)
                workers = [
                    pool.submit(self._pack_what_is_left, pending, ranks)
                    for _ in range(processes - 1)
                ]

                def watch() -> None:
                    for worker in workers:
                        if worker.done():
                            worker.result()
                    show(progress, task)

                self._pack_what_is_left(pending, ranks, (shared, taken), watch, parallel=False)
                while not all(worker.done() for worker in workers):
                    wait(workers, timeout=0.5, return_when=FIRST_EXCEPTION)
                    watch()
                watch()
            except BrokenProcessPool as error:
                _stop_if_told()
                raise UserError(
                    f"data: a process that packed {self.directory} was killed (out of memory?): "
                    "start again to continue, perhaps with fewer --processes"
                ) from error
            finally:
                # Not waiting for a lock that a killed worker may hold.
                taken.get_obj().value = len(pending)
                pool.shutdown(cancel_futures=True)

    def _pack_what_is_left(
        self, pending: list, ranks: Ranks | None, shared: tuple = (), show: Any = None,
        parallel: bool = True,
    ) -> None:  # fmt: skip
        """Packs shards that no other process has taken, until there is none.

        Args:
            pending: all shards to pack.
            ranks: of the tokenizer, where they are known already.
            shared: progress, and how many shards are taken; in a worker it has them already.
            show: called now and then.
            parallel: whether to tokenize on all cores.
        """
        progress, taken = shared or _shared
        tokenizer = packing_tokenizer(self.tokenizer_directory)
        document_encoder(tokenizer, token_dtype(tokenizer), ranks)
        while True:
            with taken.get_lock():
                slot, taken.value = taken.value, taken.value + 1
            if slot >= len(pending):
                return
            self._pack_shard(*pending[slot], slot, progress, show, parallel)

    def _pack_shard(
        self, split: Split, index: int, n_shard: int, slot: int, progress: Any, show: Any,
        parallel: bool,
    ) -> None:  # fmt: skip
        """Packs one shard; ``slot`` is its place in the shared progress."""
        tokenizer = packing_tokenizer(self.tokenizer_directory)
        reader = open_stripe(self.source, split, index, n_shard, self.on_error)
        counts, digest = PackingCounts(), hashlib.sha256()
        if split == "val":
            measured = ByteCount(tokenizer)
            texts = measured.texts(reader)
            documents = measured.tokens(encode_documents(tokenizer, texts, parallel=parallel))
        else:
            documents = encode_documents(tokenizer, reader, parallel=parallel)
        rows = pack(documents, self.sequence_len + 1, self.packing, counts)
        target = self._shard_file(split, index, n_shard, ".bin")

        def write(file) -> None:
            for row in rows:
                data = row.tobytes()
                digest.update(data)
                file.write(data)
                if counts.rows % REPORT_EVERY_ROWS == 0:
                    progress[2 * slot : 2 * slot + 2] = [reader.fraction, counts.tokens]
                    if show:
                        show()
            if split == "val":
                measured.check("the val documents")

        write_file(target, write)
        progress[2 * slot : 2 * slot + 2] = [1.0, counts.tokens]
        description = {
            **asdict(counts),
            **asdict(reader.counts),
            "bytes": counts.rows * (self.sequence_len + 1) * token_dtype(tokenizer).itemsize,
            "sha256": digest.hexdigest(),
        }
        text = json.dumps(description, indent=1) + "\n"
        write_file(self._shard_file(split, index, n_shard, ".json"), text)

    def _write_manifest(self) -> None:
        tokenizer = packing_tokenizer(self.tokenizer_directory)
        shards: dict[str, list] = {split: [] for split in self.splits}
        for split, index, n_shard in self.shards():
            name = self._shard_file(split, index, n_shard, ".bin").name
            description = _read_json(self._shard_file(split, index, n_shard, ".json"))
            shards[split].append({"file": name, **description})
        for split, parts in shards.items():
            if not sum(part["rows"] for part in parts):
                raise UserError(
                    f"data: the {split} documents do not fill one row of {self.sequence_len} tokens"
                )
        settings = self.settings()
        claimed = _read_json(self.directory / SETTINGS)
        if settings["fingerprint"] != claimed.get("fingerprint"):
            raise UserError(
                f"data: the text changed while it was packed: delete {self.directory} and prepare "
                "it again when its files are complete"
            )
        manifest = {
            "settings": settings,
            "dtype": token_dtype(tokenizer).name,
            "vocab_size": vocabulary_size(tokenizer),
            "tokenizer_hash": _hash_of(self.tokenizer_directory),
            "shards": shards,
        }
        text = json.dumps(manifest, indent=1) + "\n"
        path = self.directory / MANIFEST
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
        write_file(path, text)
        for split, parts in shards.items():
            total = total_counts(parts)
            say(
                f"{self.directory}: {total['rows']:,} {split} rows of {self.sequence_len} tokens "
                f"from {total['documents']:,} documents; "
                f"{total['cropped'] / max(1, total['tokens']):.1%} of their tokens cropped, "
                f"{total['empty']:,} rows without text, {total['skipped']:,} skipped"
                + self.crop_advice(total)
            )

    def crop_advice(self, counts: dict[str, int]) -> str:
        """What to do where packing loses most of the text, to end a sentence with; else "".

        Args:
            counts: `total_counts` of a split.
        """
        if self.packing.kind == "concat" or 2 * counts["cropped"] <= counts["tokens"]:
            return ""
        return (
            "; a document longer than a row is cropped to it, and a whole .txt, .md or .py file is "
            "one document: cut it, or set data.init_args.packing.kind: concat and another "
            "data.init_args.directory"
        )

    def read_manifest(self) -> dict[str, Any]:
        """The manifest of a prepared corpus."""
        manifest = _read_json(self.directory / MANIFEST)
        if not {"settings", "dtype", "vocab_size", "tokenizer_hash", "shards"} <= set(manifest):
            raise UserError(f"{self.directory / MANIFEST} lacks keys: delete {self.directory}")
        if tokenizer_hash(self.tokenizer_directory) != manifest["tokenizer_hash"]:
            raise UserError(
                f"{self.tokenizer_directory} is not the tokenizer that {self.directory} was "
                "prepared with: delete the directory to prepare it anew"
            )
        return manifest

    def open_rows(self, split: Split, manifest: dict[str, Any]) -> "Rows":
        """The packed rows of one split."""
        return Rows(
            self.directory,
            manifest["shards"][split],
            self.sequence_len + 1,
            np.dtype(manifest["dtype"]),
            manifest["vocab_size"],
        )


class Rows:
    """All rows of a split, by global index, read from disk as they are asked for.

    Rows are read by position rather than through a memory map, so that resident memory does not
    grow with what has been read, and a shard that disappears is an error with its name.
    """

    def __init__(
        self, directory: Path, shards: list[dict], row_len: int, dtype: np.dtype, vocab_size: int
    ):
        self.row_len, self.dtype, self.vocab_size = row_len, dtype, vocab_size
        self.row_bytes = row_len * dtype.itemsize
        self.paths = [directory / shard["file"] for shard in shards]
        self.ends = np.cumsum([shard["rows"] for shard in shards])
        self.fingerprint = hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest()
        for path, shard in zip(self.paths, shards, strict=True):
            if not path.is_file() or path.stat().st_size != shard["rows"] * self.row_bytes:
                raise UserError(f"{path} is missing or truncated: bov prepare packs it again")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The rows at ``indices``, (n, row_len), in the order asked for."""
        result = np.empty((len(indices), self.row_len), dtype=self.dtype)
        shards = np.searchsorted(self.ends, indices, side="right")
        for shard in np.unique(shards):
            first = self.ends[shard - 1] if shard else 0
            places = np.flatnonzero(shards == shard)
            try:
                with open(self.paths[shard], "rb", buffering=0) as file:
                    for place in places:
                        offset = int(indices[place] - first) * self.row_bytes
                        data = os.pread(file.fileno(), self.row_bytes, offset)
                        result[place] = np.frombuffer(data, dtype=self.dtype)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{self.paths[shard]} cannot be read any more ({error}): bov prepare packs "
                    "it again"
                ) from error
        if result.size and result.max() >= self.vocab_size:
            names = ", ".join(str(self.paths[shard]) for shard in np.unique(shards))
            raise UserError(
                f"{names} holds token id {result.max()}, beyond the {self.vocab_size} of its "
                "tokenizer: delete it, and bov prepare packs it again"
            )
        return result


def _ranks(directory: Path) -> Ranks | None:
    """What workers encode with, so that it is worked out once; None where it is not to be had."""
    tokenizer = packing_tokenizer(directory)
    try:
        ranks = ranks_of(tokenizer)
        reason = document_encoder(tokenizer, token_dtype(tokenizer), ranks).reason
    except UnsuitedError as error:
        ranks, reason = None, str(error)
    if reason is not None:
        say(f"tokenizing takes several times as long as with tiktoken: {reason}")
    return ranks


def packing_tokenizer(directory: Path) -> Tokenizer:
    """Kept from shard to shard and from lane to lane: loading takes time, and so does what is
    prepared for it (`data_modules.encoding`)."""
    return _read_once(directory, (directory / "tokenizer.json").stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_once(directory: Path, changed: int) -> Tokenizer:
    return read_tokenizer(directory)


_hashes: dict[str, str] = {}


def _hash_of(directory: str | Path) -> str:
    """`tokenizer_hash`, worked out once for the same files: reading them as JSON takes a while."""
    files = sorted(path for path in Path(directory).glob("*.json") if path.is_file())
    key = " ".join(f"{path.name} {_sha256(path)}" for path in files)
    if key not in _hashes:
        _hashes[key] = tokenizer_hash(directory)
    return _hashes[key]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def total_counts(parts: list[dict[str, Any]]) -> dict[str, int]:
    """The counts of a split: those of its shards together."""
    counts = (k for k, value in parts[0].items() if isinstance(value, int))
    return {name: sum(part[name] for part in parts) for name in counts}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
