"""What the stages share: their options, and what they have found so far, kept in a JSON file."""

import argparse
import json
from pathlib import Path
from typing import Any


class Results(dict[str, Any]):
    """A mapping in a file."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def keep(self, **found: Any) -> None:
        """Adds what was found, prints it, and writes the file."""
        for name, value in found.items():
            print(f"{name}: {value}", flush=True)
        self.update(found)
        self.write()

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        aside = self.path.with_name(f".{self.path.name}")
        aside.write_text(json.dumps(self), encoding="utf-8")
        aside.replace(self.path)


def stage_parser(description: str) -> argparse.ArgumentParser:
    """The options that every stage takes."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU")
    return parser
