"""Data: packing, preparation, the packed loader and the stream, beside the bare tokenizer.

    python benchmarks/data.py [--text 'corpus/train-*.parquet'] [--tokenizer FOLDER] [--repeats 5]

Without --text it reads the standard library of the running Python; without --tokenizer it trains
one. What is compared takes turns, and is compared by the cores' time too, which other work on
the machine disturbs less.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from harness import median_seconds, peak_memory_mb, report, side_by_side

from data_modules.corpus import Corpus
from data_modules.packing import PackingConfig, pack_best_fit
from data_modules.reader import open_stripe
from data_modules.sources import StandardLibrary, TextFiles
from data_modules.tokenizer import TokenizerConfig, encode_documents, read_tokenizer


def resident_mb() -> float:
    """Resident memory of this process now, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def resident_after_reading(corpus: Corpus, copies: int, folder: Path) -> float:
    """Growth of resident memory, MB, by reading every row of ``copies`` times the corpus."""
    big = folder / f"x{copies}"
    shutil.copytree(corpus.directory, big)
    manifest = json.loads((big / "manifest.json").read_text())
    originals = manifest["shards"]["train"]
    for copy in range(1, copies):
        for shard in originals:
            name = f"copy{copy}-{shard['file']}"
            shutil.copyfile(big / shard["file"], big / name)
            manifest["shards"]["train"] = [*manifest["shards"]["train"], {**shard, "file": name}]
    corpus = Corpus(big, corpus.source, sequence_len=corpus.sequence_len)
    # Here as well as below: processes that prepare import this file, and it needs torch.
    from data_modules.packed import TrainingRows

    rows = corpus.open_rows("train", manifest)
    before = resident_mb()
    for batch in TrainingRows(rows, 16, len(rows) // 16, 0, 0, 1):
        del batch
    shutil.rmtree(big)
    return resident_mb() - before


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", nargs="+", help="parquet files; default: the standard library")
    parser.add_argument("--tokenizer", help="a folder with a tokenizer.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--sequence-len", type=int, default=2048)
    options = parser.parse_args()

    # Here, since processes that prepare import this file, and these need torch.
    from data_modules.packed import TrainingRows
    from data_modules.streaming import StreamingRows

    source = TextFiles(options.text, options.text) if options.text else StandardLibrary()
    folder = Path(tempfile.mkdtemp())
    cores = os.cpu_count() or 1
    seconds, ratios, rates = {}, {}, {}
    try:
        first = Corpus(
            folder / "first", source, TokenizerConfig(
                options.vocab_size, path=options.tokenizer, max_chars=5 * 10**7
            ),
            sequence_len=options.sequence_len, n_shard=16,
        )  # fmt: skip
        first.prepare()
        tokenizer = read_tokenizer(first.tokenizer_directory)
        own_tokenizer = TokenizerConfig(path=str(first.tokenizer_directory))
        texts = list(open_stripe(source, "train"))

        def tokenize() -> int:
            encoded = (
                tokenizer.encode_batch(texts[i : i + 512], add_special_tokens=False)
                for i in range(0, len(texts), 512)
            )
            return sum(len(encoding.ids) for batch in encoded for encoding in batch)

        documents = list(encode_documents(tokenizer, texts))
        n_token = sum(len(ids) - 1 for ids in documents)
        for i in range(0, len(texts), 512):
            expected = tokenizer.encode_batch(texts[i : i + 512], add_special_tokens=False)
            found = [ids[1:].tolist() for ids in documents[i : i + 512]]
            assert found == [encoding.ids for encoding in expected]
        seconds["packing"] = median_seconds(
            lambda: sum(1 for _ in pack_best_fit(documents, options.sequence_len + 1)),
            max(1, options.repeats),
        )
        rates["packing_tokens_per_s"] = n_token / seconds["packing"]

        def prepare() -> None:
            corpus = Corpus(
                folder / "again", source, own_tokenizer, sequence_len=options.sequence_len,
                n_shard=16, splits=("train",),
            )  # fmt: skip
            corpus.prepare(processes=cores)
            shutil.rmtree(folder / "again")

        stream = Corpus(
            folder / "stream", source, own_tokenizer, PackingConfig("concat", 64),
            options.sequence_len, splits=(),
        )  # fmt: skip
        stream.prepare()
        # The whole text once, after a warm-up that lets the worker processes start.
        n_step, n_warm = n_token // (64 * options.sequence_len), 3
        streamed: list[float] = []

        def read_stream() -> None:
            iterator = iter(StreamingRows(stream, 64, 1, n_step, 16, cores, 0, 1))
            for _ in range(n_warm):
                next(iterator)
            started = time.perf_counter()
            for _ in range(n_step - n_warm):
                next(iterator)
            streamed.append(time.perf_counter() - started)
            iterator.close()

        spent: dict[str, list[float]] = {}

        def counted(name: str, action: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                before = sum(os.times()[:4])
                action()
                spent.setdefault(name, []).append(sum(os.times()[:4]) - before)

            return run

        actions = {"tokenizer": tokenize, "prepare": prepare, "streaming": read_stream}
        actions = {name: counted(name, action) for name, action in actions.items()}
        seconds |= side_by_side(actions, options.repeats)
        seconds["streaming"] = float(np.median(streamed))
        ratios["prepare_vs_tokenizer"] = seconds["tokenizer"] / seconds["prepare"]
        per_s = (n_step - n_warm) * 64 * options.sequence_len / seconds["streaming"]
        ratios["streaming_vs_tokenizer"] = per_s / (n_token / seconds["tokenizer"])
        for name in actions:
            seconds[f"{name}_of_all_cores"] = float(np.median(spent[name]))
            ratios[f"{name}_vs_tokenizer_of_all_cores"] = (
                seconds["tokenizer_of_all_cores"] / seconds[f"{name}_of_all_cores"]
            )
        del ratios["tokenizer_vs_tokenizer_of_all_cores"]

        rows = first.open_rows("train", first.read_manifest())
        n_batch = min(2000, len(rows))

        def load() -> None:
            for batch in TrainingRows(rows, 16, n_batch, 0, 0, 1):
                del batch

        seconds["loader"] = median_seconds(load, max(1, options.repeats))
        rates["loader_tokens_per_s"] = n_batch * 16 * options.sequence_len / seconds["loader"]

        memory = {
            "resident_growth_mb_x1": resident_after_reading(first, 1, folder),
            "resident_growth_mb_x10": resident_after_reading(first, 10, folder),
            "peak_mb": peak_memory_mb(),
        }
        report(
            "data",
            {"text": options.text or "standard library", "tokens": n_token, **vars(options)},
            seconds,
            ratios,
            rates={name: round(value) for name, value in rates.items()},
            memory={name: round(value, 1) for name, value in memory.items()},
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
