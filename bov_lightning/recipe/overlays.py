"""The rules by which several YAML files and options become one recipe.

A recipe is a YAML file, or several: a later one overrides an earlier one key by key, except that

- a ``budget`` or a ``class_path`` of another class replaces the whole block;
- a ``value.source`` leaves nothing of an earlier file's ``source_args`` and settings of a gate;
- ``key+: [...]`` extends a list.

Dotted command-line options (``--model.config.n_layer 6``) are one more overlay.
"""

import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from bov_lightning.errors import UserError
from bov_lightning.kinds import home
from bov_lightning.model.lookup import import_module_of
from bov_lightning.recipe.settling import option_value
from bov_lightning.recipe.yaml_text import parse_yaml

REPLACED_WHOLE = {"model.budget"}

VALUE = "model.config.value"

OF_SOURCE = ("source_args", "gate_channels", "gate_factor", "gate_inputs")
"""Keys of the value section that overlays set only where their source or gate has such settings."""


def default_run_name(overlays: list[tuple[Path, dict]]) -> str:
    """The first file's name, and those of the later files that change the model."""
    first, *later = overlays
    return "-".join([first[0].stem, *(path.stem for path, data in later if "model" in data)])


def find_recipe(name: str) -> Path:
    """The file of that path; failing that the packaged recipe (``quickstart``, ``values/bov``)."""
    relative = Path(home(name, "--config"))
    within = Path(*relative.parts[1:]) if relative.parts[:1] == ("recipes",) else relative
    packaged = packaged_recipes() / within
    for path in (relative, packaged, packaged.with_name(packaged.name + ".yaml")):
        if path.is_file():
            return path
    raise UserError(f"recipe {name} does not exist, here or among those of the package")


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; never runs code."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise UserError(f"{path} cannot be read: it is empty")
    content = parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} is no recipe: its top level must be a mapping of keys")
    return content


def merge(base: dict, overlay: dict, path: str = "") -> dict:
    """``base`` overridden by ``overlay``, as the module's docstring says; neither is changed."""
    merged = dict(base)
    if path == VALUE and "source" in base and "source" in overlay:
        merged = {key: value for key, value in merged.items() if key not in OF_SOURCE}
    for key, value in overlay.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(key, str) and key.endswith("+"):
            old = merged.get(key[:-1]) or []
            merged[key[:-1]] = [*old, *(value if isinstance(value, list) else [value])]
            continue
        old = merged.get(key)
        other_class = (
            isinstance(old, dict) and isinstance(value, dict)
            and "class_path" in old and "class_path" in value
            and old["class_path"] != value["class_path"]
        )  # fmt: skip
        if isinstance(value, dict):
            kept = isinstance(old, dict) and not other_class and here not in REPLACED_WHOLE
            merged[key] = merge(old if kept else {}, value, here)
        else:
            merged[key] = value
    return merged


def text_overlay(train: list[str], val: list[str]) -> dict:
    """An overlay that trains on text files instead; its directory is named after the patterns."""
    if not train and not val:
        return {}
    if not train or not val:
        raise UserError("--data and --val-data go together: text to train on, text to validate on")
    train = [home(name, "--data") for name in train]
    val = [home(name, "--val-data") for name in val]
    digest = hashlib.sha256(repr((train, val)).encode()).hexdigest()[:8]
    source = {"class_path": "data_modules.TextFiles", "init_args": {"train": train, "val": val}}
    return {"data": {"init_args": {"directory": f"data/text-{digest}", "source": source}}}


def split_options(options: list[str]) -> list[tuple[str, str]]:
    """(dotted key, text) of ``--a.b value`` and ``--a.b=value``."""
    pairs, remaining = [], list(options)
    while remaining:
        option = remaining.pop(0)
        if not option.startswith("--"):
            raise UserError(f"unexpected argument {option!r}: options look like --run.name NAME")
        key, has_value, text = option[2:].partition("=")
        if not has_value:
            if not remaining:
                raise UserError(f"option --{key} needs a value")
            text = remaining.pop(0)
        pairs.append((key, text))
    return pairs


def parse_options(options: list[str], settings: dict | None = None) -> dict:
    """Options as an overlay {a: {b: value}}.

    Args:
        options: dotted keys and values, as `split_options` takes them.
        settings: what the files before them say: its classes decide what their arguments are.
    """
    pairs = split_options(options)
    settings = settings or {}
    for key, text in pairs:
        if key.endswith(".class_path") or text.lstrip().startswith("{"):
            settings = merge(settings, _nested(key, option_value(key, text, settings)))
    overlay: dict = {}
    for key, text in pairs:
        overlay = merge(overlay, _nested(key, option_value(key, text, settings)))
    return overlay


def _nested(key: str, value: Any) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def import_source(overlay: dict, origin: str) -> None:
    """Imports the module of a value source that ``overlay`` names by its class path.

    For recipes that the user gives; what a checkpoint names is not imported for it.
    """
    value = ((overlay.get("model") or {}).get("config") or {}).get("value") or {}
    if "." not in str(value.get("source")):
        return
    try:
        import_module_of(str(value["source"]))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def fill_vocab_size(settings: dict) -> dict:
    """``settings`` with model.config.vocab_size taken from the data's tokenizer, if it is null.

    A tokenizer that is still to be trained counts with the size that it is asked for.
    """
    config = (settings.get("model") or {}).get("config") or {}
    data = settings.get("data")
    if config.get("vocab_size") is not None or not isinstance(data, dict):
        return settings
    arguments = data.get("init_args")
    tokenizer = arguments.get("tokenizer") if isinstance(arguments, dict) else None
    if not isinstance(tokenizer, dict):
        return settings
    if tokenizer.get("path"):
        from data_modules.tokenizer import read_tokenizer, vocabulary_size

        found = read_tokenizer(home(str(tokenizer["path"])), tokenizer.get("start"))
        vocab_size = vocabulary_size(found)
    else:
        vocab_size = tokenizer.get("vocab_size")
    return merge(settings, {"model": {"config": {"vocab_size": vocab_size}}})


def packaged_recipes() -> Path:
    """The folder of the recipes that come with the package."""
    package = Path(str(files("bov_lightning")))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"
