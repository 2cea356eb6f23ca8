"""The YAML that users give: read in one way, without code, and without losing anything."""

from typing import Any

import yaml

from bov_lightning.errors import UserError

MAX_VALUES = 100_000
"""Values of a file, those that aliases repeat counted as often as they stand for."""

MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Plain data. Numbers that YAML 1.1 reads in another base than people do are refused."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """12, 0x1f, 0b11, 1_000; not 010 and 1:30, which would be 8 and 90."""
        digits = node.value.lstrip("+-").replace("_", "")
        if ":" in digits or (digits[:1] == "0" and digits.isdigit() and len(digits) > 1):
            value = super().construct_yaml_int(node)
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value} would be the number {value}: write {value}, or, where "
                f"text is meant, {node.value!r} in quotes", node.start_mark,
            )  # fmt: skip
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str | bytes, origin: str) -> Any:
    """The value of one YAML document; None for one without content.

    Args:
        text: the document; bytes are UTF-8, with or without a byte order mark.
        origin: what errors call it.

    Raises:
        UserError: no YAML, or YAML that means less than it says: a key that is given twice,
            several documents, aliases without end.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        loader = _Loader(text.removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise UserError(f"{origin} cannot be read: byte {error.start} is no UTF-8") from None
    except yaml.reader.ReaderError as error:
        raise UserError(
            f"{origin} cannot be read: the character U+{error.character:04X} is not allowed in YAML"
        ) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, loader)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{origin} cannot be read: {_explain(error, text)}") from None
    except RecursionError:
        raise UserError(f"{origin} cannot be read: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{origin} cannot be read: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def texts(text: str) -> Any:
    """A YAML value all of whose scalars are text as it is written, such as ``[a, no, 1:30]``.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, yaml.BaseLoader)


def _explain(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if error.context == "expected a single document in the stream":
        return f"{where}a second document starts: give one file for each"
    lines = text.split("\n")
    if mark and "\t" in lines[min(mark.line, len(lines) - 1)][: mark.column + 1]:
        return f"{where}a tab, which YAML does not allow there: use spaces"
    return where + " ".join(filter(None, (error.problem, error.context and f"({error.context})")))


def _check(root: yaml.Node, loader: _Loader) -> None:
    """Refuses keys that are given twice, and aliases that stand for too much."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def visit(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            _refuse("an alias stands for what it is part of", node)
        open_nodes.add(id(node))
        size = 1
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node, loader)
            size += sum(visit(key) + visit(value) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(visit(item) for item in node.value)
        if size > MAX_VALUES:
            _refuse(f"with its aliases it holds more than {MAX_VALUES:,} values", node)
        open_nodes.discard(id(node))
        sizes[id(node)] = size
        return size

    visit(root)


def _refuse_twice(mapping: yaml.MappingNode, loader: _Loader) -> None:
    lines: dict[Any, int] = {}
    for node, _ in mapping.value:
        if not isinstance(node, yaml.ScalarNode):
            _refuse("a key must be text", node)
        key = "<<" if node.tag == MERGE else loader.construct_object(node)
        line = node.start_mark.line + 1
        if key in lines:
            _refuse(f"{node.value} is given twice, in lines {lines[key]} and {line}", node)
        lines[key] = line


def _refuse(problem: str, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
