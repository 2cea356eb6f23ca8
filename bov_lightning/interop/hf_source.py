"""The modelling file of an export, made of the package's own files."""

import ast
import functools
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from bov_lightning import errors, kinds
from bov_lightning.errors import UserError
from bov_lightning.interop import hf_arguments, hf_cache, hf_model, hf_vocabulary
from bov_lightning.interop.hf_model import MODULE
from bov_lightning.model import (
    attention,
    cache,
    config,
    decode,
    kernels,
    layers,
    lookup,
    loss,
    loss_kernel,
    matmul,
    ngrams,
    offload,
    prefill,
    transformer,
    turned_keys,
    values,
)
from bov_lightning.model.lookup import class_path
from bov_lightning.model.values import BankOfValues, ValueSource
from bov_lightning.text import lines
from bov_lightning.version import __version__

PARTS = (
    errors, kinds, matmul, layers, lookup, config, attention, kernels, decode, turned_keys, ngrams,
    values, loss_kernel, loss, offload, cache, transformer, prefill, hf_cache, hf_arguments,
    hf_vocabulary, hf_model,
)  # fmt: skip
"""The files of the network, each after those that it imports."""

SELF_CONTAINED = {"torch", "transformers", *sys.stdlib_module_names}
"""What the modelling file of an export may import."""


def _is_own(node: ast.AST) -> bool:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return any(name.partition(".")[0] == "bov_lightning" for name in names)


def _is_type_only(node: ast.AST) -> bool:
    is_if = isinstance(node, ast.If) and not node.orelse
    return is_if and ast.unparse(node.test) == "TYPE_CHECKING"


def _is_exported(module: str, name: str) -> bool:
    """Whether what ``from module import name`` gives is in an export by that name."""
    if name == "*":
        return any(part.__name__ == module for part in PARTS)
    value = getattr(importlib.import_module(module), name, None)
    owners = [part for part in PARTS if name in vars(part) and vars(part)[name] is value]
    return bool(owners) and not inspect.ismodule(value)


def _dropped(tree: ast.Module) -> Iterator[ast.AST]:
    """What a part of the assembled file leaves out: docstring, imports, own imports anywhere."""
    if ast.get_docstring(tree) is not None:
        yield tree.body[0]
    yield from (node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    for node in ast.walk(tree):
        if _is_type_only(node) or (isinstance(node, ast.Import | ast.ImportFrom) and _is_own(node)):
            yield node


def _statements(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    """The statements of every block: of the file, of functions, of branches."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block:
                yield block


def _without(code: str, tree: ast.Module) -> str:
    """A part's code without what `_dropped` names, however it is laid out on its lines."""
    dropped = {id(node) for node in _dropped(tree)}
    # Lines of Python end where those of text do: a form feed is white space in it.
    found = list(lines(code, keep_ends=True))
    starts = [0, *itertools.accumulate(map(len, found))]

    def place(line: int, column: int) -> int:
        return starts[line - 1] + len(found[line - 1].encode()[:column].decode())

    cuts = []
    for block in _statements(tree):
        gone = [node for node in block if id(node) in dropped]
        for node in gone:
            start = place(node.lineno, node.col_offset)
            end = place(node.end_lineno, node.end_col_offset)
            before, after = starts[node.lineno - 1], starts[node.end_lineno]
            alone = not code[before:start].strip() and re.fullmatch(
                r"\s*(#.*)?\s*", code[end:after]
            )
            # A block is not left empty, nor a line half.
            stays = not alone or (block is not tree.body and len(gone) == len(block))
            cuts.append((start, end, "pass") if stays else (before, after, ""))
    done, pieces = 0, []
    for start, end, instead in sorted(cuts):
        if start >= done:
            pieces += [code[done:start], instead]
            done = end
    return "".join([*pieces, code[done:]])


def _parts(source: type[ValueSource]) -> Iterator[tuple[str, str]]:
    """(name, source code) of each file; a value source of somebody's own is one of them."""
    for part in PARTS:
        yield part.__name__, inspect.getsource(part)
        if part is values and source.__module__ != values.__name__:
            yield source.__module__, _own_source(source)


def _defined(code: str) -> set[str]:
    """The names that a file defines at its top, imports left out."""
    names: set[str] = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)}
    return names


def check_exportable(source: type[ValueSource]) -> None:
    """Raises a `UserError` where an export could not hold the file of a value source."""
    if source.__module__ != values.__name__:
        _own_source(source)


def _own_source(source: type[ValueSource]) -> str:
    """The file of a value source from outside of the package, checked to fit into an export."""
    try:
        code = inspect.getsource(sys.modules[source.__module__])
    except (OSError, TypeError):
        raise UserError(
            f"{class_path(source)} cannot be exported: it is in no file; make it a module"
        ) from None
    tree = ast.parse(code)
    types = {id(n) for node in ast.walk(tree) if _is_type_only(node) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        outside = {name.partition(".")[0] for name in names} - SELF_CONTAINED - {"bov_lightning"}
        # What is known by another name, or not at all, in a file that holds the network alone.
        unknown = _is_own(node) and (
            isinstance(node, ast.Import)
            or any(alias.asname for alias in node.names)
            or (
                id(node) not in types
                and not all(_is_exported(node.module, alias.name) for alias in node.names)
            )
        )
        if outside or unknown or getattr(node, "level", 0):
            raise UserError(
                f"{class_path(source)} cannot be exported: an export holds all of its code in one "
                f"file, so its module cannot have the line `{ast.unparse(node)}`; torch, the "
                "standard library and `from bov_lightning... import NAME` of what belongs to the "
                "network are possible"
            )
    taken = {name: part.__name__ for part in PARTS for name in _defined(inspect.getsource(part))}
    for name in _defined(code):
        if name in taken:
            raise UserError(
                f"{class_path(source)} cannot be exported: an export holds all of its code in one "
                f"file, where {name} is what {taken[name]} defines: give it another name in "
                f"{source.__module__}"
            )
    # Known by its path there too, in whatever file it then is.
    return f"{code}\n\n{source.__qualname__}.__module__ = {source.__module__!r}\n"


def modelling_source(source: type[ValueSource] = BankOfValues) -> str:
    """The network and its `transformers` classes as one module that imports only torch and
    transformers, made of this package's own files, and of that of ``source`` if it is another."""
    return _assembled(tuple(_parts(source)))


@functools.lru_cache(maxsize=4)
def _assembled(parts: tuple[tuple[str, str], ...]) -> str:
    """(name, code) of each file as one file; kept, since a training saves the same one often."""
    imports: set[str] = set()
    bodies = []
    for name, code in parts:
        tree = ast.parse(code)
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom) and not _is_own(node):
                imports.add(ast.unparse(node))
        body = _without(code, tree).strip()
        title = " ".join((ast.get_docstring(tree) or "").partition("\n")[0].split())
        bodies.append(f"# {name}: {title}\n\n{body}")
    head = (
        f'"""Transformer with Bank of Values (arXiv 2606.02780), made by bov-lightning '
        f'{__version__}. Apache-2.0."""'
    )
    assembled = "\n\n\n".join([head, "\n".join(sorted(imports)), *bodies]) + "\n"
    left = [node for node in ast.walk(ast.parse(assembled)) if _is_own(node)]
    assert not left, f"the export would need this package: {ast.unparse(left[0])}"
    return assembled


def import_module(directory: Path) -> ModuleType:
    """The modelling file of an export that this process has just written."""
    name = f"_bov_export_{abs(hash(directory))}"
    spec = importlib.util.spec_from_file_location(name, directory / f"{MODULE}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
