"""YAML as people read it, for pipelines and profiles: no key twice, 1e-5 a number, 1:30:00 and 2026-01-01 texts.

PyYAML reads YAML 1.1, where 1:30:00 is the number 5400, 2026-01-01 is no text, 1e-5 is one, and the second of two equal
keys wins.
"""

import re
from typing import Any

import yaml

NULLS = ("", "~", "null", "Null", "NULL")  # plain scalars that are no value, YAML 1.2
_MERGE = "tag:yaml.org,2002:merge"


class _Strict:
    """Refuse a key that stands twice in a mapping, however each is spelled, naming both lines, and a value that holds
    itself (`&a [*a]`), which has no end.

    Keys are the same where their values are, or their text is: 1 and 0x1, 1 and "1", a and "a". A merge (`<<: *base`)
    gives what the mapping does not write itself; two merges that give the same key are refused too.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        _check_ends(node, around=(), checked=set())
        return yaml.constructor.BaseConstructor.construct_document(self, node)

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


def _check_ends(node: yaml.Node, around: tuple[yaml.Node, ...], checked: set[yaml.Node]) -> None:
    """Refuse a node that holds itself; `around` are the nodes that hold it."""
    if node in around:
        raise yaml.constructor.ConstructorError(None, None, "this value holds itself, by an alias", node.start_mark)
    if node in checked or isinstance(node, yaml.ScalarNode):
        return
    for part in node.value:
        for held in part if isinstance(part, tuple) else (part,):
            _check_ends(held, (*around, node), checked)
    checked.add(node)


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


def read_values(text: str) -> Any:
    """Return the value of a YAML text. Raise yaml.YAMLError."""
    return yaml.load(text, ValueLoader)


def read_typed(text: str, loader: type = ValueLoader) -> Any:
    """Return the value of a text that somebody typed as one: an override, a variable.

    Raise yaml.YAMLError, also where YAML would leave out something of it in silence: a comment, which nobody types
    there, and a line break without quotes, which becomes a space.
    """
    end = 0
    for token in yaml.scan(text):
        is_comment = "#" in text[end : token.start_mark.index]
        end = max(end, token.end_mark.index)
        folded = isinstance(token, yaml.ScalarToken) and "\n" in text[token.start_mark.index : end].rstrip()
        if is_comment or (folded and token.style not in tuple("|>")):
            lost = "from ' #' on it is a comment" if is_comment else "its line break becomes a space"
            raise yaml.YAMLError(f"{lost}; put the text in double quotes within the value, with \\n for a line break")
    return yaml.load(text, loader)
