"""A recipe as it was given: by files and options, or by a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bov_lightning.errors import UserError
from bov_lightning.recipe.building import build
from bov_lightning.recipe.keys import check_keys
from bov_lightning.recipe.overlays import (
    default_run_name,
    fill_vocab_size,
    find_recipe,
    import_source,
    merge,
    parse_options,
    read_yaml,
    text_overlay,
)
from bov_lightning.recipe.sections import BudgetConfig, Recipe
from bov_lightning.recipe.settling import settle_recipe

MOVED = {"bov_lightning.strategy.ShardedStrategy": "bov_lightning.ShardedStrategy"}
"""Class paths that recipes stored by earlier versions hold, and where the classes are now."""

HARMLESS = ("accelerator", "devices", "precision")
"""What counts of the trainer section of a checkpoint, which may be a stranger's."""


@dataclass(frozen=True)
class Given:
    """A recipe, typed and as plain data, and what to call it in messages."""

    recipe: Recipe
    plain: dict[str, Any]
    """The merged mapping, for LightningCLI and for files."""
    origin: str
    stored: bool = False
    """Whether a run or a checkpoint holds it: what it says of its data is taken as it stands."""

    def error(self, text: str) -> UserError:
        """The error for a mistake in this recipe."""
        return UserError(f"{self.origin}: {text}")

    @property
    def budget(self) -> BudgetConfig:
        """How long to train; a recipe that does not say is a `UserError`."""
        if self.recipe.model.budget is None:
            raise self.error("model.budget is not set: give flops, tokens or steps")
        return self.recipe.model.budget

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.recipe.run.root) / self.recipe.run.name


def read(
    paths: Sequence[str] = (), options: Sequence[str] = (), *, data: Sequence[str] = (),
    val_data: Sequence[str] = (), base: dict | None = None,
) -> Given:  # fmt: skip
    """The recipe of some files and options, each an overlay on those before it.

    Args:
        paths: recipe files, or names of packaged ones.
        options: dotted keys and their values, as on a command line.
        data: text files to train on instead; or the recipe's ``data`` section, as a mapping.
        val_data: text files to validate on.
        base: what the first file is an overlay on.

    Raises:
        UserError: whatever is wrong with them.
    """
    if not paths and base is None:
        raise UserError("give a recipe: --config recipes/quickstart.yaml")
    overlays = [(path := find_recipe(name), read_yaml(path)) for name in paths]
    # `--data {class_path: ...}` is the recipe's key.
    whole = [text for text in data if text.lstrip().startswith("{")]
    text = text_overlay([name for name in data if name not in whole], list(val_data))
    options = [x for section in whole for x in ("--data", section)] + list(options)
    settings = dict(base or {})

    def add(origin: str, overlay: dict) -> None:
        nonlocal settings
        check_keys(overlay, origin)
        import_source(overlay, origin)
        overlay = _today(overlay)
        # The data's class takes seconds to import, which commands that build none need not pay:
        # `data_section` settles it, but cannot tell what of it a stored recipe said.
        with_data = base is not None
        overlay = settle_recipe(overlay, merge(settings, overlay), origin, with_data)
        settings = merge(settings, overlay)

    for path, overlay in (*overlays, ("--data", text)):
        add(str(path), overlay)
    add("command line", parse_options(options, settings))
    if overlays and not (settings.get("run") or {}).get("name"):
        settings = merge(settings, {"run": {"name": default_run_name(overlays)}})
    settings = fill_vocab_size(settings)
    origin = paths[-1] if paths else "recipe"
    return Given(build(Recipe, settings, origin), settings, origin, stored=base is not None)


def _today(overlay: dict) -> dict:
    """The overlay with today's path of a class that an earlier version stored."""
    strategy = (overlay.get("trainer") or {}).get("strategy")
    if not isinstance(strategy, dict) or strategy.get("class_path") not in MOVED:
        return overlay
    strategy = {**strategy, "class_path": MOVED[strategy["class_path"]]}
    return {**overlay, "trainer": {**overlay["trainer"], "strategy": strategy}}


def read_stored(
    path: Path, paths: Sequence[str] = (), options: Sequence[str] = (), **data: Sequence[str]
) -> Given:
    """The recipe that a run or a checkpoint holds, with overlays of the user's own.

    It may come from a stranger, so it names no classes but this project's.

    Args:
        path: its config.yaml.
        paths: recipe files, as in `read`.
        options: dotted keys and values, as in `read`.
        data: ``data`` and ``val_data``, as in `read`.

    Raises:
        UserError: a class of somebody else's, or whatever else is wrong.
    """
    stored = read_yaml(path)
    check_keys(stored, str(path))
    stored["trainer"] = {k: v for k, v in (stored.get("trainer") or {}).items() if k in HARMLESS}
    _check_classes(stored.get("data") or {}, path)
    given = read(paths, options, base=stored, **data)
    return given if paths else replace(given, origin=str(path))


def _check_classes(data: Any, path: Path) -> None:
    if isinstance(data, dict):
        name = data.get("class_path", "data_modules.")
        if not str(name).startswith("data_modules."):
            raise UserError(
                f"{path} names the class {name}: to trust it, give its data section in a "
                "--config of your own and remove it there"
            )
    for value in data.values() if isinstance(data, dict) else data:
        if isinstance(value, dict | list):
            _check_classes(value, path)
