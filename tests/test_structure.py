"""The streets of the house: who may import whom, and that nobody imports in a circle.

Imports are read from the source (`ast`), lazy and type-only ones included: what only a function or
an annotation needs ties files together too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGES = ("bov_lightning", "data_modules", "evaluation")

FLOORS = (
    ("errors", "files", "kinds", "claims", "console", "text", "version", "upstream"),
    ("model",),
    ("distributed",),
    ("optim",),
    ("recipe",),
    ("checkpoint",),
    ("run",),
    ("planning", "interop"),
    ("inference",),
    ("training",),
    ("report",),
    ("value_probe",),
    ("launch",),
    ("cli",),
)
"""The folders and files of bov_lightning: each imports from its own floor's folder and from below.
hf.py and __init__.py are doors, which open upwards."""

NEVER = {
    "bov_lightning/model": ("lightning", "transformers", "lm_eval", "bov_lightning.recipe"),
    "bov_lightning/optim": ("lightning", "transformers", "bov_lightning.files"),
    "bov_lightning/recipe/sections.py": ("torch", "lightning"),
    "bov_lightning/report": ("torch", "lightning"),
    "bov_lightning/checkpoint": ("lightning",),
    "bov_lightning/planning": ("lightning",),
    "bov_lightning/inference": ("lightning",),
    "bov_lightning/interop": ("lightning",),
    "bov_lightning/value_probe": ("lightning", "bov_lightning.training"),
    "data_modules": ("bov_lightning.model", "bov_lightning.training", "evaluation"),
    "serving/vllm/bov_vllm": (
        "lightning",
        "lm_eval",
        "bov_lightning.checkpoint",
        "bov_lightning.recipe",
        "bov_lightning.training",
        "bov_lightning.inference",
        "bov_lightning.cli",
        "data_modules",
    ),
    "evaluation": ("bov_lightning.training", "bov_lightning.launch", "bov_lightning.cli"),
}
"""What the files below a path must not import."""


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements(body: list[ast.AST]) -> Iterator[ast.AST]:
    """All statements below these: imports are no expressions, of which there are many."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from statements(getattr(node, name, ()))


def imports_of(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file; the name is empty for ``import module``."""
    for node in statements(ast.parse(source).body):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield from ((node.module, alias.name) for alias in node.names)


def read_tree(root: Path) -> dict[str, set[str]]:
    """The modules of the packages, and which of them each imports."""
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    modules = {module_of(path, root): path for path in files}
    graph = {}
    for module, path in modules.items():
        found = set()
        for imported, name in imports_of(path.read_text(encoding="utf-8")):
            whole = f"{imported}.{name}"
            found |= {target for target in (whole if whole in modules else imported,)
                      if target in modules}  # fmt: skip
        graph[module] = found - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected sets of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            members = []
            while not members or members[-1] != node:
                members.append(stack.pop())
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def climbs(graph: dict[str, set[str]]) -> list[str]:
    """Imports of bov_lightning from a higher floor, or from another folder of the same one."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    found = []
    for module, targets in graph.items():
        own = module.split(".")[1:2]
        if not module.startswith("bov_lightning.") or own == ["hf"]:
            continue
        assert own[0] in floor, f"{own[0]} has no floor: name it in FLOORS"
        for target in targets:
            theirs = target.split(".")[1:2]
            if not target.startswith("bov_lightning.") or theirs == own:
                continue
            if floor[theirs[0]] >= floor[own[0]] and own[0] not in FLOORS[0]:
                found.append(f"{module} -> {target}")
    return sorted(found)


def forbidden(root: Path) -> list[str]:
    """Imports that `NEVER` names."""
    found = []
    for place, names in NEVER.items():
        files = sorted((root / place).rglob("*.py")) if (root / place).is_dir() else [root / place]
        for path in files:
            for module, name in imports_of(path.read_text(encoding="utf-8")):
                whole = f"{module}.{name}."
                found += [f"{path.relative_to(root)} -> {module}" for never in names
                          if whole.startswith(f"{never}.")]  # fmt: skip
    return found


def test_nobody_imports_in_a_circle():
    assert circles(read_tree(REPOSITORY)) == []


def test_imports_go_down():
    assert climbs(read_tree(REPOSITORY)) == []


def test_folders_do_not_know_what_they_must_not():
    assert forbidden(REPOSITORY) == []


@pytest.fixture
def house(tmp_path) -> Path:
    """A small tree in which nothing is wrong."""
    for name, text in {
        "errors": "", "model/values": "from bov_lightning.errors import UserError",
        "recipe/sections": "from bov_lightning.model.values import x",
        "training/fit": "from bov_lightning.recipe import sections",
    }.items():  # fmt: skip
        path = tmp_path / "bov_lightning" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for package in PACKAGES[1:]:
        (tmp_path / package).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("model/values", "def f():\n    from bov_lightning.recipe import sections", circles),
        ("model/values", "if X:\n    from bov_lightning.recipe.sections import y", circles),
        ("model/values", "try:\n    pass\nexcept X:\n    import bov_lightning.recipe.sections",
         circles),
        ("recipe/sections", "import bov_lightning.training.fit", climbs),
        ("model/values", "import lightning.pytorch as pl", forbidden),
        ("recipe/sections", "from torch import nn", forbidden),
    ],
)  # fmt: skip
def test_a_broken_rule_is_found(house, monkeypatch, name, text, rule):
    """The checks themselves, on a small tree: before and after one line is added."""
    monkeypatch.setattr(
        f"{__name__}.NEVER", {k: v for k, v in NEVER.items() if (house / k).exists()}
    )
    look = forbidden if rule is forbidden else lambda root: rule(read_tree(root))
    assert look(house) == []
    path = house / "bov_lightning" / f"{name}.py"
    path.write_text(f"{path.read_text()}\n{text}\n")
    assert look(house) != []
