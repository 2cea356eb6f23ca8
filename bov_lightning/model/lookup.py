"""Which class ``value.source`` names. Costs no torch, so that configurations do not either."""

import importlib
import os
import sys

from bov_lightning.errors import UserError

BUILT_IN = "bov_lightning.model.values"
"""The module of the sources that come with the package: imported when the first one is asked for.
In the file of an exported model they are there already."""

TRUSTED = "BOV_TRUSTED_MODULES"
"""Variable that names the modules, separated by commas, that a checkpoint's class may come from."""

_named: dict[str, type] = {}
_all: list[type] = []


def register(cls: type, name: str | None) -> None:
    """Makes a value source known, by its class path and, if it has one, by its ``name``."""
    _all.append(cls)
    if name is not None:
        _named[name] = cls


def class_path(cls: type) -> str:
    """``module.Class``, as recipes name a source of somebody's own."""
    return f"{cls.__module__}.{cls.__qualname__}"


def import_module_of(path: str) -> None:
    """Imports the module of a class path, or raises a `UserError` where there is none."""
    module, _, _ = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")):
        raise UserError(f"value.source {path!r} is no class path such as my_module.MySource")
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"value.source {path} cannot be imported, since there is no module {error.name}: "
            "install it, or put its folder on PYTHONPATH"
        ) from None


def named_sources() -> dict[str, type]:
    """The sources that come with the package, by name."""
    if not _named:
        importlib.import_module(BUILT_IN)
    return _named


def _known() -> dict[str, type]:
    """All sources by name and by class path."""
    # The last one of a path: a notebook may have run its cell again.
    return {class_path(cls): cls for cls in _all} | named_sources()


def is_own(cls: type) -> bool:
    """Whether a source is somebody's own: not of this package."""
    return not cls.__module__.startswith(f"{BUILT_IN.partition('.')[0]}.")


def source_class(name: str) -> type:
    """The `ValueSource` of that name, or of that class path.

    A stranger's checkpoint is read by this too, so a class path is looked up among the classes that
    are imported anyway; only a module that BOV_TRUSTED_MODULES names is imported for it. Those of
    the user's own recipes are, before, by `bov_lightning.recipe.overlays.import_source`.

    Raises:
        UserError: an unknown name, with the known ones, or a class that is not imported.
    """
    named = named_sources()
    module, _, own = name.rpartition(".")
    if module and module in os.environ.get(TRUSTED, "").split(","):
        try:
            import_module_of(name)
        except UserError:
            # The file of an exported model has the class, wherever its module is.
            if name not in _known():
                raise
    sources = _known()
    if name in sources:
        return sources[name]
    if module in sys.modules:
        there = [x.rpartition(".")[2] for x in sources if x.rpartition(".")[0] == module]
        raise UserError(
            f"value.source {name}: module {module} has no value source {own}; it has "
            f"{', '.join(there) or 'none'}"
        )
    if module:
        raise UserError(
            f"value.source {name} is not imported: a recipe of yours that names it imports it, a "
            f"checkpoint does not; if you trust that module, set {TRUSTED}={module}"
        )
    raise UserError(
        f"value.source {name!r} is unknown: use one of {', '.join(named)}, or the class path of "
        "a source of your own"
    )
