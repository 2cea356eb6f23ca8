"""The modelling file of an export, made of the package's own files."""

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from bov_lightning import errors
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
    matmul,
    offload,
    prefill,
    transformer,
    values,
)
from bov_lightning.model.lookup import class_path
from bov_lightning.model.values import BankOfValues, ValueSource
from bov_lightning.version import __version__

PARTS = (
    errors, matmul, layers, lookup, config, attention, kernels, decode, values, loss, offload,
    cache, transformer, prefill, hf_cache, hf_arguments, hf_vocabulary, hf_model,
)  # fmt: skip
"""The files of the network, each after those that it imports."""

SELF_CONTAINED = {"torch", "transformers", *sys.stdlib_module_names}
"""What the modelling file of an export may import."""


def _is_own(node: ast.AST) -> bool:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return any(name.partition(".")[0] == "bov_lightning" for name in names)


def _dropped(tree: ast.Module) -> Iterator[ast.AST]:
    """What a part of the assembled file leaves out: docstring, imports, own imports anywhere."""
    if ast.get_docstring(tree) is not None:
        yield tree.body[0]
    yield from (node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    for node in ast.walk(tree):
        type_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if type_only or (isinstance(node, ast.Import | ast.ImportFrom) and _is_own(node)):
            yield node


def _parts(source: type[ValueSource]) -> Iterator[tuple[str, str]]:
    """(name, source code) of each file; a value source of somebody's own is one of them."""
    for part in PARTS:
        yield part.__name__, inspect.getsource(part)
        if part is values and source.__module__ != values.__name__:
            yield source.__module__, _own_source(source)


def _own_source(source: type[ValueSource]) -> str:
    """The file of a value source from outside of the package, checked to fit into an export."""
    try:
        code = inspect.getsource(sys.modules[source.__module__])
    except (OSError, TypeError):
        raise UserError(
            f"{class_path(source)} cannot be exported: it is in no file; make it a module"
        ) from None
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        outside = {name.partition(".")[0] for name in names} - SELF_CONTAINED - {"bov_lightning"}
        renamed = _is_own(node) and (
            isinstance(node, ast.Import) or any(alias.asname for alias in node.names)
        )
        if outside or renamed or getattr(node, "level", 0):
            raise UserError(
                f"{class_path(source)} cannot be exported: an export holds all of its code in one "
                f"file, so its module cannot have the line `{ast.unparse(node)}`; torch, the "
                "standard library and `from bov_lightning... import NAME` are possible"
            )
    # Known by its path there too, in whatever file it then is.
    return f"{code}\n\n{source.__qualname__}.__module__ = {source.__module__!r}\n"


def modelling_source(source: type[ValueSource] = BankOfValues) -> str:
    """The network and its `transformers` classes as one module that imports only torch and
    transformers, made of this package's own files, and of that of ``source`` if it is another."""
    imports: set[str] = set()
    bodies = []
    for name, code in _parts(source):
        tree, lines = ast.parse(code), code.splitlines()
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom) and not _is_own(node):
                imports.add(ast.unparse(node))
        for node in _dropped(tree):
            for line in range(node.lineno - 1, node.end_lineno):
                lines[line] = None
        body = "\n".join(line for line in lines if line is not None).strip()
        title = (ast.get_docstring(tree) or "").partition("\n")[0]
        bodies.append(f"# {name}: {title}\n\n{body}")
    head = (
        f'"""Transformer with Bank of Values (arXiv 2606.02780), made by bov-lightning '
        f'{__version__}. Apache-2.0."""'
    )
    return "\n\n\n".join([head, "\n".join(sorted(imports)), *bodies]) + "\n"


def import_module(directory: Path) -> ModuleType:
    """The modelling file of an export that this process has just written."""
    name = f"_bov_export_{abs(hash(directory))}"
    spec = importlib.util.spec_from_file_location(name, directory / f"{MODULE}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
