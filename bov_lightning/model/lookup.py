"""Which class ``value.source`` names. Costs no torch, so that configurations do not either."""

import importlib
import os

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


def source_class(name: str) -> type:
    """The `ValueSource` of that name, or of that class path.

    A stranger's checkpoint is read by this too, so a class path is looked up among the classes that
    are imported anyway; only a module that BOV_TRUSTED_MODULES names is imported for it. Those of
    the user's own recipes are, before, by `bov_lightning.recipe.overlays.import_source`.

    Raises:
        UserError: an unknown name, with the known ones, or a class that is not imported.
    """
    named = named_sources()
    module, _, _ = name.rpartition(".")
    if module and module in os.environ.get(TRUSTED, "").split(","):
        import_module_of(name)
    # The last one of a path: a notebook may have run its cell again.
    sources = {class_path(cls): cls for cls in _all} | named
    if name in sources:
        return sources[name]
    if module:
        raise UserError(
            f"value.source {name} is not imported: a recipe of yours that names it imports it, a "
            f"checkpoint does not; if you trust that module, set {TRUSTED}={module}"
        )
    raise UserError(
        f"value.source {name!r} is unknown: use one of {', '.join(named)}, or the class path of "
        "a source of your own"
    )
