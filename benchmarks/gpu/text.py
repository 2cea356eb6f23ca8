"""Text without a download: the Python files of this machine's own packages."""

import json
import sysconfig
from pathlib import Path

from data_modules.sources import cut_at_lines


def options_of(text: Path | None, folder: Path, megabytes: float) -> list[str]:
    """--data and --val-data of `bov`: the files of ``text``, else files written to ``folder``."""
    if text is None:
        write_text(folder, megabytes)
        text = folder
    return ["--data", str(text / "train-*"), "--val-data", str(text / "val-*")]


def write_text(folder: Path, megabytes: float) -> None:
    """Writes train-0.jsonl and val-0.jsonl, every tenth document to the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    left = megabytes * 1e6
    with open(folder / "train-0.jsonl", "w") as train, open(folder / "val-0.jsonl", "w") as val:
        for number, document in enumerate(_documents()):
            (val if number % 10 == 0 else train).write(json.dumps({"text": document}) + "\n")
            left -= len(document)
            if left < 0:
                return


def _documents():
    paths = sysconfig.get_paths()
    for root in dict.fromkeys((paths["stdlib"], paths["purelib"])):
        for path in sorted(Path(root).rglob("*.py")):
            yield from cut_at_lines(path.read_text(encoding="utf-8", errors="replace"), 500)
