"""Writes what the pages take from the code, so that neither can grow old.

python docs/write_pages.py
    keys.md, from the configs' own docstrings
python docs/write_pages.py commands.md FOLDER [PATTERN]
    runs the page's commands (that match) in a folder that has the quickstart's run, and puts what
    they print beneath each
"""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from docstring_parser import parse_from_object

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


def _type(annotation: typing.Any) -> str:
    """An annotation as a reader of YAML understands it."""
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(str(option) for option in typing.get_args(annotation))
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " or ".join(_type(option) for option in typing.get_args(annotation))
    names = {bool: "true or false", str: "text", int: "integer", float: "number"}
    if annotation in names:
        return names[annotation]
    if typing.get_origin(annotation) is list:
        return f"list of {_type(typing.get_args(annotation)[0])}"
    if dataclasses.is_dataclass(annotation):
        names = [field.name for field in dataclasses.fields(annotation)]
        return f"mapping of {', '.join(names[:-1])} and {names[-1]}"
    if typing.get_origin(annotation) is dict:
        return "mapping"
    return f"class_path of a {annotation.__name__}"


def _yaml(value: typing.Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if dataclasses.is_dataclass(value):
        return "its own defaults"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _table(rows: list[tuple[str, ...]]) -> str:
    head = ("key", "what", "type", "default")
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _described(cls: type) -> dict[str, str]:
    return {entry.arg_name: entry.description or "" for entry in parse_from_object(cls).params}


def _section_of(annotation: typing.Any) -> type | None:
    """The dataclass in ``D`` or ``D | None``."""
    options = typing.get_args(annotation) or (annotation,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def sections(cls: type, key: str = "") -> Iterator[tuple[str, type]]:
    """(dotted key, dataclass) of a section and all within it."""
    yield key, cls
    for name, annotation in typing.get_type_hints(cls).items():
        if nested := _section_of(annotation):
            yield from sections(nested, f"{key}.{name}".lstrip("."))


def _fields(cls: type, key: str) -> list[tuple[str, ...]]:
    described, hints = _described(cls), typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        here = f"{key}.{field.name}".lstrip(".")
        if _section_of(hints[field.name]):
            link = f"[`{field.name}`](#{here.replace('.', '')})"
            rows.append((link, _cell(described[field.name]), "section", ""))
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = (
                inspect.Parameter.empty
                if field.default_factory is dataclasses.MISSING
                else field.default_factory()
            )
        what = _cell(described[field.name])
        rows.append((f"`{field.name}`", what, _type(hints[field.name]), _yaml(default)))
    return rows


def _arguments(cls: type) -> list[tuple[str, ...]]:
    described, hints = _described(cls.__init__), typing.get_type_hints(cls.__init__)
    return [
        (f"`{name}`", _cell(described[name]), _type(hints[name]), _yaml(parameter.default))
        for name, parameter in inspect.signature(cls).parameters.items()
    ]


def keys() -> str:
    """keys.md."""
    import data_modules
    from bov_lightning.distributed.strategy import ShardedStrategy

    parts = [
        "# Keys of a recipe",
        "<!-- Written by docs/write_pages.py from the docstrings: change those. -->",
        "Every key with its meaning, type and default. `bov fit --keys` prints the same in a "
        "terminal; [Recipes](recipes.md) tells how files are put together.",
    ]
    for key, cls in sections(Recipe):
        parts += [f"## {key or 'The whole recipe'}", cls.__doc__.strip(), _table(_fields(cls, key))]
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
        parts += [title, " ".join(doc.split()), _table(_arguments(cls))]
        if cls is not classes[1]:
            continue
        parts.append("Of both, `tokenizer`:")
        parts.append(_table(_fields(data_modules.TokenizerConfig, "tokenizer")))
        parts.append("and `packing`:")
        parts.append(_table(_fields(data_modules.PackingConfig, "packing")))
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
