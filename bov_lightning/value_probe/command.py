"""`bov probe`: models and text files in, a table, JSON or a page out."""

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from bov_lightning.console import CONSOLE, say
from bov_lightning.errors import UserError
from bov_lightning.inference.loading import check_device
from bov_lightning.report.page import WRITERS
from bov_lightning.value_probe.content import as_text, make_report
from bov_lightning.value_probe.probing import probe
from bov_lightning.value_probe.result import ProbeResult
from bov_lightning.value_probe.settings import ProbeSettings
from data_modules.reader import StripeReader
from data_modules.sources import TextFiles

N_OPEN = 200
"""Files that are read by turns: systems let a process open some more than that."""


def documents(patterns: list[str]) -> Iterator[str]:
    """The documents of text files, by turns from each file: none decides alone what text it is.

    Where one of `N_OPEN` files ends, the next one takes its turn.

    Raises:
        UserError: no file, or one that cannot be read.
    """
    source = TextFiles(train=patterns, val=[])
    readers = (
        iter(StripeReader(source, "train", units=[unit])) for unit in source.units("train", 1)
    )
    turns = deque(islice(readers, N_OPEN))
    while turns:
        reader = turns.popleft()
        if (text := next(reader, None)) is not None:
            turns.append(reader)
            yield text
        else:
            turns.extend(islice(readers, 1))


class _Screen:
    """What is being done, where there is a terminal."""

    def __init__(self, name: str):
        self.name = name
        self.status = CONSOLE.status(f"{name}: reading")

    def __call__(self, what: str, done: int, total: int) -> None:
        of = f" of {total:,}" if total else ""
        self.status.update(f"{self.name}: {done:,}{of} {what}")


def probe_models(
    models: list[str], data: list[str], settings: ProbeSettings, *, device: str = "cpu",
    dtype: str = "float32", state: Path | None = None,
) -> list[ProbeResult]:  # fmt: skip
    """Probes each model on the same text.

    Raises:
        UserError: see `probe`; also a model that cannot be loaded.
    """
    # Seconds that --help need not pay.
    from evaluation.command import DTYPES, load_model

    check_device(device)
    if len(set(models)) < len(models):
        raise UserError("a model is named twice")
    results = []
    for path in models:
        model, _, tokenizer = load_model(path, device, DTYPES[dtype])
        own = Path(path).absolute()
        mark = hashlib.sha256(f"{own}:{dtype}".encode()).hexdigest()[:8]
        screen = _Screen(own.name)
        with screen.status:
            result = probe(
                model, tokenizer, documents(data), settings, name=own.name, progress=screen,
                state_directory=None if state is None else state / f"{own.name}-{mark}",
            )  # fmt: skip
        results.append(result)
    return results


def probe_command(
    models: list[str], data: list[str], settings: ProbeSettings, *, output: Path | None = None,
    format: str = "html", as_json: bool = False, **how,
) -> None:  # fmt: skip
    """Probes, prints and writes; ``how`` goes to `probe_models`."""
    if output is not None:
        if output.is_dir() and format in ("html", "md"):
            raise UserError(f"--output {output} is a directory: give a file")
        if output.is_file() and format in ("csv", "png"):
            raise UserError(f"--output {output} is a file: --format {format} writes a directory")
        if how.get("state") is None:
            how["state"] = output.with_name(f"{output.name}.state")
    results = probe_models(models, data, settings, **how)
    report = make_report(results)
    if as_json:
        print(json.dumps({"models": [result.as_dict() for result in results]}))
    else:
        print("\n\n".join(map(as_text, results)))
    if output is not None:
        WRITERS[format](report, output)
        say(f"{output}: {report.summary}")
