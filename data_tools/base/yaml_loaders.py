"""YAML as people read it, for pipelines and profiles: no key twice, 1e-5 a number, 1:30:00 and 2026-01-01 texts.

PyYAML reads YAML 1.1, where 1:30:00 is the number 5400, 2026-01-01 is no text, 1e-5 is one, and the second of two equal
keys wins.

What is read is bounded (data_tools/base/bounds.py): bytes, levels, and values with those of aliases counted each time,
since whoever goes through them meets them each time.
"""

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from data_tools.base import bounds

NULLS = ("", "~", "null", "Null", "NULL")  # plain scalars that are no value, YAML 1.2
_MERGE = "tag:yaml.org,2002:merge"


class _Strict:
    """Refuse a key that stands twice in a mapping, however each is spelled, naming both lines, and a value that holds
    itself (`&a [*a]`), which has no end.

    Keys are the same where their values are, or their text is: 1 and 0x1, 1 and "1", a and "a". A merge (`<<: *base`)
    gives what the mapping does not write itself; two merges that give the same key are refused too.

    Whatever is wrong with a text is a YAMLError: PyYAML itself raises others for values that a tag makes impossible.
    """

    _depth = 0

    # PyYAML looks through all levels at each token: what is too deep is refused where it is met.

    def fetch_flow_collection_start(self, token: type) -> None:
        scanner: Any = self
        _check_depth(scanner.flow_level, scanner.get_mark())
        yaml.scanner.Scanner.fetch_flow_collection_start(self, token)

    def add_indent(self, column: int) -> bool:
        scanner: Any = self
        _check_depth(len(scanner.indents), scanner.get_mark())
        return yaml.scanner.Scanner.add_indent(self, column)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self._depth > bounds.YAML_DEPTH.most:
            raise yaml.composer.ComposerError(
                None, None, bounds.YAML_DEPTH.exceeded(), getattr(parent, "start_mark", None)
            )
        self._depth += 1
        node = yaml.composer.Composer.compose_node(self, parent, index)
        self._depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        if _values(node, around=(), counted={}) > bounds.YAML_VALUES.most:
            raise yaml.constructor.ConstructorError(None, None, bounds.YAML_VALUES.exceeded(), node.start_mark)
        return yaml.constructor.BaseConstructor.construct_document(self, node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return yaml.constructor.BaseConstructor.construct_object(self, node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # KeyError, ValueError, AttributeError: what the constructors of PyYAML meet in a scalar
            is_number = isinstance(node, yaml.ScalarNode) and len(node.value) > sys.get_int_max_str_digits() > 0
            kind = node.tag.rpartition(":")[2]
            why = f"it has {len(node.value):,} digits" if is_number else f"{str(node.value)!r:.60} is none"
            raise yaml.constructor.ConstructorError(None, None, f"no {kind}: {why}", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        merged = yaml.MappingNode(node.tag, self._pairs(node), node.start_mark, node.end_mark)
        return yaml.constructor.BaseConstructor.construct_mapping(self, merged, deep)

    def _pairs(self, node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
        """Return the (key, value) nodes of a mapping, what it merges first."""
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "<< wants other mappings to merge", node.start_mark)
        own, merged = _Keys(self), _Keys(self)
        for key, value in node.value:
            if key.tag != _MERGE:
                own.add(key, value)
        merges = [value for key, value in node.value if key.tag == _MERGE]
        for value in merges[1:]:
            _stands_twice("<<", merges[0], value)
        for value in merges:
            for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                for pair in self._pairs(one):
                    merged.add(*pair)
        return [pair for pair in merged.pairs if not own.has(pair[0])] + own.pairs


def _check_depth(levels: int, mark: Any) -> None:
    if levels > bounds.YAML_DEPTH.most:
        raise yaml.scanner.ScannerError(None, None, bounds.YAML_DEPTH.exceeded(), mark)


def _values(node: yaml.Node, around: tuple[yaml.Node, ...], counted: dict[yaml.Node, int]) -> int:
    """Return how many values a node is, those of an alias counted each time. Refuse one that holds itself; `around` are
    the nodes that hold it."""
    if node in around:
        raise yaml.constructor.ConstructorError(None, None, "this value holds itself, by an alias", node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return 1
    if node not in counted:
        held = [item for part in node.value for item in (part if isinstance(part, tuple) else (part,))]
        counted[node] = 1 + sum(_values(item, (*around, node), counted) for item in held)
    return counted[node]


class _Keys:
    """Represents the keys of one mapping, each once."""

    def __init__(self, loader: Any):
        self.loader = loader
        self.pairs: list[tuple[yaml.Node, yaml.Node]] = []
        self._nodes: dict[Any, yaml.Node] = {}  # by value and by text

    def _names(self, node: yaml.Node) -> tuple[Any, Any]:
        key = self.loader.construct_object(node, deep=True)
        try:
            hash(key)
        except TypeError:
            raise yaml.constructor.ConstructorError(
                None, None, "a list or a mapping is no key", node.start_mark
            ) from None
        return ("value", key), ("text", str(key))

    def has(self, node: yaml.Node) -> bool:
        return any(name in self._nodes for name in self._names(node))

    def add(self, key: yaml.Node, value: yaml.Node) -> None:
        for name in self._names(key):
            if name in self._nodes:
                _stands_twice(key.value, self._nodes[name], key)
        self._nodes |= dict.fromkeys(self._names(key), key)
        self.pairs.append((key, value))


def _stands_twice(key: Any, first: yaml.Node, second: yaml.Node) -> None:
    lines = f"on line {first.start_mark.line + 1} and on line {second.start_mark.line + 1}"
    raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice, {lines}", second.start_mark)


class Nothing(str):
    """Represents a scalar that is written as no value (`key:`, `~`, `null`): an empty text that tells so."""


class TextLoader(_Strict, yaml.BaseLoader):
    """Loads every scalar as text, no value as `Nothing`."""

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        """Return the text of a scalar. Raise ConstructorError for what is none."""
        is_null = isinstance(node, yaml.ScalarNode) and node.style is None
        return Nothing() if is_null and node.value in NULLS else super().construct_scalar(node)


class ValueLoader(_Strict, yaml.SafeLoader):
    """Loads scalars as null, booleans, integers and floats as in YAML 1.2, or text."""

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


ValueLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
ValueLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|nan))$"
    ),
    list("-+0123456789."),
)


def load(text: str, loader: type) -> Any:
    """Return the value of a YAML text as one of these loaders reads it. Raise yaml.YAMLError for all that is wrong."""
    if len(text) > bounds.YAML.most:
        raise yaml.YAMLError(f"it has {bounds.YAML.exceeded()}")
    try:
        return yaml.load(text, loader)
    except RecursionError:  # whoever raised the bound
        raise yaml.YAMLError("it is nested too deep") from None


def read_file(path: Path) -> str:
    """Return the text of a YAML file, for `load`. Raise UserMistake where it is too large, OSError where it is no
    regular file or cannot be read, yaml.YAMLError where it is not UTF-8."""
    try:
        return bounds.read_text(path, bounds.YAML)
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"not UTF-8 at byte {error.start}: {error.reason}") from None


def read_values(text: str) -> Any:
    """Return the value of a YAML text. Raise yaml.YAMLError."""
    return load(text, ValueLoader)


def read_typed(text: str, loader: type = ValueLoader) -> Any:
    """Return the value of a text that somebody typed as one: an override, a variable.

    Raise yaml.YAMLError, also where YAML would leave out something of it in silence: a comment, which nobody types
    there, and a line break without quotes, which becomes a space.
    """
    end = 0
    for token in yaml.scan(text, loader):
        is_comment = "#" in text[end : token.start_mark.index]
        end = max(end, token.end_mark.index)
        folded = isinstance(token, yaml.ScalarToken) and "\n" in text[token.start_mark.index : end].rstrip()
        if is_comment or (folded and token.style not in tuple("|>")):
            lost = "from ' #' on it is a comment" if is_comment else "its line break becomes a space"
            raise yaml.YAMLError(f"{lost}; put the text in double quotes within the value, with \\n for a line break")
    return load(text, loader)
