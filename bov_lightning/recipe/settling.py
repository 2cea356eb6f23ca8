"""What a user gives for a key, by the key's type: one decision for files, options and classes.

- Text is text. An option's is taken as it is written; in a file, what YAML reads as something else
  has to be quoted. Empty text is a mistake: a variable of the shell that is not set.
- ``~`` at the start of a path is the home.
- A number lies in its range.
"""

from types import NoneType
from typing import Any

import yaml

from bov_lightning.errors import UserError
from bov_lightning.kinds import home, needed, number_in, options_of, range_of
from bov_lightning.recipe.annotations import (
    TRAINER,
    annotation_at,
    class_at,
    dataclass_of,
    element_of,
    hints_of,
    is_free_text,
    is_local_path,
    is_optional,
    is_text,
)
from bov_lightning.recipe.sections import Recipe
from bov_lightning.recipe.yaml_text import parse_yaml, texts


def option_value(key: str, text: str, settings: dict) -> Any:
    """The value of ``--key text`` for a recipe that holds ``settings`` so far."""
    annotation = annotation_at(key, settings, hints_of(Recipe))
    if not text.strip():
        raise UserError(
            f"--{key} is empty (a variable that is not set?): give it a value or leave it out"
        )
    element = element_of(annotation)
    if text == "null" and is_optional(annotation):
        return None
    if is_text(annotation):
        return text
    if element is not None and is_free_text(element):
        return _list_of_text(key, text)
    return parse_yaml(text, f"--{key}")


def _list_of_text(key: str, text: str) -> list[str]:
    """``[a, b]``, or a single text."""
    if not text.lstrip().startswith("["):
        return [text]
    try:
        found = texts(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise UserError(f"--{key} {text}: give a list of texts, such as [a, b]")
    return found


def settle_recipe(overlay: dict, settings: dict, origin: str, with_data: bool) -> dict:
    """An overlay of the user's, checked and with its paths resolved.

    Args:
        overlay: its keys exist.
        settings: the recipe with the overlay in it, which says what the classes are whose
            arguments the overlay gives.
        origin: what errors call it.
        with_data: also the data section, whose class then is imported.
    """
    hints = hints_of(Recipe)
    settled = dict(overlay)
    try:
        for key, value in overlay.items():
            name = key.removesuffix("+")
            context = settings.get(name)
            if name == "trainer" and isinstance(value, dict):
                settled[key] = _settle_keys(value, TRAINER, name, context)
            elif name != "data" or with_data:
                settled[key] = settle(value, hints[name], name, context)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    return settled


def settle(value: Any, annotation: Any, where: str, context: Any = None) -> Any:
    """A value for the key ``where``; ``context`` is what the whole recipe has there."""
    if isinstance(value, dict):
        if section := dataclass_of(annotation):
            return _settle_keys(value, hints_of(section), where, context)
        if "class_path" in value or "init_args" in value:
            return _settle_class(value, where, context)
    if isinstance(value, list):
        element = element_of(annotation)
        items = enumerate(value)
        return [settle(x, Any if element is None else element, f"{where}[{i}]") for i, x in items]
    element = element_of(annotation)
    if isinstance(value, str) and element is not None and is_free_text(element):
        # What extends a list need be none itself.
        annotation = element
    if is_free_text(annotation) and value is not None:
        return _settle_text(value, annotation, where)
    found, number = range_of(annotation), number_in(value)
    if found is not None and value is not None:
        kinds = set(options_of(annotation)) - {NoneType}
        fits = number is not None and (float in kinds or isinstance(number, int))
        if kinds <= {int, float} and not fits:
            raise UserError(f"{where} is {value!r}, but must be {needed(annotation)}")
        if number is not None and (wrong := found.refusal(number)):
            raise UserError(f"{where} {wrong}")
    return value


def _settle_keys(value: dict, hints: dict, where: str, context: Any) -> dict:
    context = context if isinstance(context, dict) else {}
    settled = {}
    for key, item in value.items():
        name = str(key).removesuffix("+")
        settled[key] = settle(item, hints.get(name, Any), f"{where}.{name}", context.get(name))
    return settled


def _settle_class(value: dict, where: str, context: Any) -> dict:
    context = context if isinstance(context, dict) else {}
    arguments = value.get("init_args")
    if not isinstance(arguments, dict):
        return value
    hints = hints_of(class_at(value.get("class_path") or context.get("class_path")))
    here = f"{where}.init_args"
    return {**value, "init_args": _settle_keys(arguments, hints, here, context.get("init_args"))}


def _settle_text(value: Any, annotation: Any, where: str) -> str:
    if not isinstance(value, str):
        if isinstance(value, dict | list):
            raise UserError(f"{where} is {value!r}, but must be {needed(annotation)}")
        kind = {bool: "true or false", int: "a number", float: "a number"}.get(
            type(value), "a date"
        )
        raise UserError(
            f"{where} must be text, but YAML reads what is there as {kind} ({value}): put it in "
            "quotes"
        )
    if not value.strip():
        null = ", or null" if is_optional(annotation) else ""
        raise UserError(f"{where} is empty: give it a text{null}")
    if not _is_unicode(value):
        raise UserError(f"{where} is {value!r}, which is no UTF-8")
    return home(value, where) if is_local_path(annotation) else value


def _is_unicode(text: str) -> bool:
    """Whether it has none of the characters that stand for bytes of something else."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
