"""Writes what the pages take from the code, so that neither can grow old.

python docs/write_pages.py
    keys.md, from the configs' own docstrings
python docs/write_pages.py commands.md FOLDER [PATTERN]
    runs the page's commands (that match) in a folder that has the quickstart's run, and puts what
    they print beneath each
"""

import inspect
import os
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from bov_lightning.recipe.annotations import dataclass_of
from bov_lightning.recipe.explained import SOURCE_ARGS, keys_of, settings_of_sources
from bov_lightning.recipe.sections import Recipe
from bov_lightning.text import lines

DOCS = Path(__file__).parent
COMMANDS = re.compile(
    r"^```bash\n(?P<commands>[^`]*)```\n\n```text\n(?P<output>.*?)^```$", re.DOTALL | re.MULTILINE
)
"""Commands, and what they print right below."""

WIDTH = 100
"""Columns of the terminal that output is recorded for."""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(rows: list[tuple[str, ...]]) -> str:
    head = ("key", "what", "type", "default")
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def sections(cls: type, key: str = "") -> Iterator[tuple[str, type]]:
    """(dotted key, dataclass) of a section and all within it."""
    yield key, cls
    for name, annotation in typing.get_type_hints(cls).items():
        if nested := dataclass_of(annotation):
            yield from sections(nested, f"{key}.{name}".lstrip("."))


def _rows(cls: type, key: str = "") -> list[tuple[str, ...]]:
    rows = []
    for found in keys_of(cls):
        name, default = f"`{found.name}`", f"`{found.default}`"
        if found.section:
            anchor = f"{key}.{found.name}".replace(".", "")
            name, default = f"[{name}](#{anchor})", ""
        elif found.default in ("required", "its own defaults"):
            default = found.default
        rows.append((name, _cell(found.meaning), found.words, default))
    return rows


def keys() -> str:
    """keys.md."""
    import data_modules
    from bov_lightning.distributed.strategy import ShardedStrategy

    parts = [
        "# Keys of a recipe",
        "<!-- Written by docs/write_pages.py from the docstrings: change those. -->",
        "Every key with its meaning, type, range and default. `bov fit --keys` prints the same in "
        "a terminal; [Recipes](recipes.md) tells how files are put together.",
    ]
    for key, cls in sections(Recipe):
        parts += [f"## {key or 'The whole recipe'}", cls.__doc__.strip(), _table(_rows(cls, key))]
        if f"{key}.source_args" == SOURCE_ARGS:
            for source, args in settings_of_sources():
                parts += [f"`source_args` of `{source}`:", _table(_rows(args))]
    parts += [
        "## Classes that a recipe names",
        "Given as `class_path` and `init_args`. [Data](data.md) explains all but the last, "
        "which [Clusters](clusters.md) does.",
    ]
    classes = [getattr(data_modules, name) for name in (
        "PackedDataModule", "StreamingDataModule", "StandardLibrary", "TextFiles", "HubDataset",
        "Mixture",
    )]  # fmt: skip
    for cls in (*classes, ShardedStrategy):
        module = "data_modules" if cls in classes else cls.__module__
        title, doc = f"### {module}.{cls.__name__}", inspect.getdoc(cls).partition("\n\n")[0]
        parts += [title, " ".join(doc.split()), _table(_rows(cls))]
        if cls is not classes[1]:
            continue
        parts.append("Of both, `tokenizer`:")
        parts.append(_table(_rows(data_modules.TokenizerConfig)))
        parts.append("and `packing`:")
        parts.append(_table(_rows(data_modules.PackingConfig)))
    return "\n\n".join(parts) + "\n"


def record(page: str, run: Callable[[str], str], pattern: str = "") -> str:
    """The page with ``run(commands)`` beneath every block of commands that shows its output."""

    def replaced(found: re.Match) -> str:
        if not re.search(pattern, found["commands"]):
            return found[0]
        output = run(found["commands"]).rstrip("\n")
        return f"```bash\n{found['commands']}```\n\n```text\n{output}\n```"

    return COMMANDS.sub(replaced, page)


def run_in(folder: Path) -> Callable[[str], str]:
    """Runs commands in a shell there, as a terminal of WIDTH columns would show them."""
    quiet = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    environment = os.environ | quiet | {"COLUMNS": str(WIDTH)}

    def run(commands: str) -> str:
        print(commands, end="", file=sys.stderr)
        result = subprocess.run(
            commands, shell=True, cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output = result.stdout.replace(sys.prefix, "/home/me/.venv")
        output = output.replace(str(folder.resolve()), "/home/me/experiments")
        return "\n".join(line.rstrip() for line in lines(output))

    return run


if __name__ == "__main__":
    if sys.argv[1:]:
        path, run = DOCS / sys.argv[1], run_in(Path(sys.argv[2]))
        path.write_text(record(path.read_text(encoding="utf-8"), run, *sys.argv[3:]))
    else:
        (DOCS / "keys.md").write_text(keys(), encoding="utf-8")
