"""A setting's declaration: beside its type and default stand its help, unit and range, and whether it is keyed.

    rank: int = setting(0, "rank of the adapters; 0 trains the model itself", least=0)

`check` refuses every value out of its range, in a whole config and by dotted key, so that no phase forgets one; what
remains for a phase's own `check` is about several settings, or about files and models. `describe` lists the same for
`afterok explain`. jobs/kind.py says what `keyed`, `input` and `module` mean. Fields without a declaration are left
alone.
"""

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal, TypeVar, Union, overload

from data_tools.mistake import Problem, nearest

Keyed = Literal[True, False, "if_set"]
T = TypeVar("T")
Config = TypeVar("Config")
_DECLARATION = "declaration"  # key of a field's metadata
FILE_OR_NAME = "file or name"  # of a setting's `input`: a file, or the name of something that comes with afterok
NAME = "NAME"  # stands in a dotted key for the names that a user gives to the entries of a mapping


@dataclass(frozen=True)
class Declaration:
    """What is known of a setting besides its type and default. Of a list or a mapping it is about each element."""

    help: str
    unit: str = ""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()  # legal values out of the range: 0 that turns something off
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # of a mapping, the legal keys
    needed: bool = False  # an empty value is refused
    free: bool = False  # every value of its type is legal
    made_by: tuple[str, ...] = ()  # of an input: the kinds of phases whose output it may be, of those we have
    example: Any = None  # a value that a user may give; None: one is made up (`example_of`)

    @property
    def legal(self) -> str:
        """Return the range or the choices in words; "" where every value is legal."""
        if self.choices:
            return " | ".join(_spelled(self.choices))
        if None not in (self.least, self.most):
            text = f"{self.least:g} to {self.most:g}"
        else:
            bounds = (
                ("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below),
            )  # fmt: skip
            text = ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        return " or ".join([text, *(f"{value:g}" for value in self.also)]) if text else ""

    def refusal(self, value: Any) -> str:
        """Return why a value is not legal, "" where it is."""
        if self.choices and value not in self.choices:
            return f"unknown value {value!r}{nearest(str(value).lower(), _spelled(self.choices))}"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value in self.also:
            return ""
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return f"{_short(value)} does not fit into 64 bits{f'; give {self.legal}' if self.legal else ''}"
        inside = (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )
        unit = f" ({self.unit})" if self.unit else ""
        return "" if inside else f"{value} is out of range: {self.legal or 'a finite number'}{unit}"


@overload
def setting(default: type[T], help: str, **declared: Any) -> T: ...
@overload
def setting(default: Callable[[], T], help: str, **declared: Any) -> T: ...
@overload
def setting(default: T, help: str, **declared: Any) -> T: ...
def setting(
    default: Any, help: str, *, keyed: Keyed = True, input: bool | str = False, module: bool = False, **declared: Any
) -> Any:
    """Return a dataclass field with its declaration: see Declaration for the further keywords.

    A default that is a class or a function is called for each config.
    """
    for name in ("choices", "names", "also", "made_by"):
        declared[name] = tuple(declared.get(name, ()))
    metadata: dict[str, Any] = {_DECLARATION: Declaration(help, **declared)}
    metadata |= {name: value for name, value in (("input", input), ("module", module)) if value}
    metadata |= {} if keyed is True else {"keyed": keyed}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


MODELS = ("import_hf", "sft", "grpo", "merge_lora")  # the kinds of phases that make a model folder
STORES, PACKS, EVALUATIONS = ("materialize",), ("pack",), ("evaluate", "run_exported")
SEEDS = {"least": -(2**63), "most": 2**63 - 1}  # what torch takes


def names_a_file(text: str) -> bool:
    """Return whether a setting FILE_OR_NAME gives a file: it has a slash, or ends in .yaml."""
    return "/" in text or text.endswith((".yaml", ".yml"))


def with_default(schema: type, name: str, default: Any) -> Any:
    """Return the field `name` of the dataclass `schema` with another default, for a class derived from it."""
    return dataclasses.field(default=default, metadata=_field(schema, name).metadata)


def declaration_of(field: "dataclasses.Field[Any]") -> Declaration | None:
    """Return what is declared of a field; None where nothing is, as in a user's own phase."""
    return field.metadata.get(_DECLARATION)


def check(config: Any, where: str = "") -> list[Problem]:
    """Return a problem for every setting of a config, its nested dataclasses, lists and mappings, that is not legal.

    `where` is the dotted key of the config itself.
    """
    return [problem for _, _, problem in _refused(config, where)]


def check_with(config: Config, own: Callable[[Config], list[Problem]]) -> list[Problem]:
    """Return what `check` finds, and what a phase's own check finds beside, which meets legal values alone.

    Where settings are not legal, it is asked twice, with two legal values in their place, and what it says both times
    holds whatever they will be. Where nothing legal stands in (a file that is missing), it may fail, and says nothing.
    """
    refused = check(config)
    if not refused:
        return own(config)
    stand_in, other = legal(config), legal(config, other=True)
    try:
        said = own(other)
        told = [problem for problem in own(stand_in) if problem in said]
    except Exception:
        if not check(stand_in):  # all that it met was legal: the fault is its own
            raise
        told = []
    known = {problem.where for problem in refused}
    return refused + [problem for problem in told if problem.where not in known]


def legal(config: Config, other: bool = False) -> Config:
    """Return the config, or where settings of it are not legal a copy in which these have their defaults, or with
    `other` another legal value; of lists and mappings the elements that are not legal are left out, or replaced."""
    if not check(config):
        return config
    copied = copy.deepcopy(config)
    for owner, field, _ in list(_refused(copied, "")):
        value = _legal_value(field, getattr(owner, field.name), other)
        object.__setattr__(owner, field.name, value)  # a user's dataclass may be frozen
    return copied


def _legal_value(field: "dataclasses.Field[Any]", value: Any, other: bool) -> Any:
    """Return what stands for a value that is not legal."""
    declared = declaration_of(field)
    if declared is None or not value or not isinstance(value, (dict, list)):
        default = _default(field)
        return _other_value(declared, default) if declared and other else default

    def is_legal(element: Any) -> bool:
        return not any(declared.refusal(leaf) for _, leaf in _elements("", element))

    if isinstance(value, list):
        kept = [element if is_legal(element) else _other_value(declared, element) for element in value]
        return kept if other else [element for element in value if is_legal(element)]
    named = [name for name in value if not declared.names or name in declared.names]
    if other:
        return {name: value[name] if is_legal(value[name]) else _other_value(declared, value[name]) for name in named}
    return {name: value[name] for name in named if is_legal(value[name])}


def _other_value(declared: Declaration, than: Any) -> Any:
    """Return a legal value of the same type that is not `than`; `than` where there is no other."""
    if declared.choices:
        return next((choice for choice in declared.choices if choice != than), than)
    if isinstance(than, bool) or not isinstance(than, (int, float)):
        return than
    bounds = [bound for bound in (declared.least, declared.above, declared.most, declared.below) if bound is not None]
    steps = (0, 1, -1, 0.5, -0.5) if isinstance(than, float) else (0, 1, -1)
    numbers = [type(than)(bound + step) for bound in [*bounds, *declared.also] for step in steps]
    return next((number for number in numbers if number != than and not declared.refusal(number)), than)


def _refused(config: Any, where: str) -> Iterator[tuple[Any, "dataclasses.Field[Any]", Problem]]:
    """Yield (dataclass, its field, problem) of every setting that is not legal."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{where}.{field.name}" if where else field.name
        declared = declaration_of(field)
        if declared and declared.needed and not value:
            yield config, field, Problem(key, f"is missing: {declared.help}")
        if declared and declared.names:
            for name in value:
                if name not in declared.names:
                    yield config, field, Problem(f"{key}.{name}", f"unknown name{nearest(name, declared.names)}")
        for place, element in _elements(key, value):
            if dataclasses.is_dataclass(element):
                yield from _refused(element, place)
            elif declared and element is not None and (refusal := declared.refusal(element)):
                yield config, field, Problem(place, refusal)


def _short(number: int) -> str:
    """Return a whole number as text, a long one by its length: Python spells none of thousands of digits."""
    digits = int(number.bit_length() * math.log10(2)) + 1
    return str(number) if digits <= 30 else f"a whole number of about {digits:,} digits"


def _elements(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, element) of all that a value holds, itself where it is no list and no mapping."""
    if isinstance(value, dict):
        for name, element in value.items():
            yield from _elements(f"{key}.{name}", element)
    elif isinstance(value, (list, tuple)):
        for place, element in enumerate(value):
            yield from _elements(f"{key}[{place}]", element)
    else:
        yield key, value


@dataclass(frozen=True)
class Described:
    """One setting of a schema, as `afterok explain` shows it."""

    key: str
    type: str
    default: Any
    unit: str
    legal: str  # the range or the choices in words
    keyed: Keyed  # whether it changes the key of its phase; "if_set": once it is not empty
    needed: bool
    help: str
    example: Any  # a legal value, not the default; None of a mapping, and where nobody knows one


def describe(schema: type, where: str = "", keyed: Keyed = True) -> list[Described]:
    """Return every setting of a dataclass in its order, those of nested dataclasses after the one that holds them.

    `where` is the dotted key of the dataclass itself, `keyed` whether it is part of the key.
    """
    kinds = typing.get_type_hints(schema)
    described = []
    for field in dataclasses.fields(schema):
        kind, declared = kinds[field.name], declaration_of(field) or Declaration("")
        key = f"{where}.{field.name}" if where else field.name
        own: Keyed = keyed and field.metadata.get("keyed", True)
        nested, name = _nested(kind)
        described.append(
            Described(
                key=key,
                type="mapping" if nested else _type_name(kind),
                default=None if nested else _default(field),
                unit=declared.unit,
                legal=declared.legal,
                keyed=own,
                needed=declared.needed or _has_none(field),
                help=declared.help,
                example=None if nested else example_of(field, kind),
            )
        )
        described += describe(nested, key + name, own) if nested else []
    return described


# By unit, what is likely to be wanted in place of 0, which turns something off.
_USUAL = {
    "tokens": 4096, "steps": 100, "packs": 64, "rows": 1000, "samples": 8, "prompts": 16, "ranks": 2, "processes": 4,
    "minutes": 60, "s": 30, "GiB": 20, "turns": 4, "layers": 12,
    "columns": 8,
}  # fmt: skip


def example_of(field: "dataclasses.Field[Any]", kind: Any) -> Any:
    """Return a value that a user may give for a setting of this type: the declared one, else one that is made up.

    None where none can be: text without choices, of which only its declaration knows what it means.
    """
    declared, default = declaration_of(field) or Declaration(""), _default(field)
    if declared.example is not None:
        return declared.example
    arguments = [argument for argument in typing.get_args(kind) if argument is not type(None)]
    if typing.get_origin(kind) is list:
        element = _example(declared, arguments[0], None)
        return None if element is None else [element]
    if typing.get_origin(kind) is dict:
        element = _example(declared, arguments[1], None)
        return None if element is None else dict.fromkeys(declared.names[:1] or (NAME,), element)
    return _example(declared, arguments[0] if arguments else kind, default)


def _example(declared: Declaration, kind: Any, default: Any) -> Any:
    """Return a legal value of a type without elements that is not the default; None where none can be made up."""
    if declared.choices:
        return next((choice for choice in declared.choices if choice and choice != default), None)
    if kind is bool:
        return not default
    if kind not in (int, float):
        return None
    bounds = [bound for bound in (declared.least, declared.above, declared.most, declared.below) if bound is not None]
    tried = [*([2 * default, default / 2] if default else [_USUAL.get(declared.unit, 1)]), 0.1, 1, 2, *bounds]
    numbers = [kind(number) for number in tried if math.isfinite(number)]
    return next((number for number in numbers if number != default and not declared.refusal(number)), None)


def _nested(kind: Any) -> tuple[type | None, str]:
    """Return (the dataclass that a setting holds, what stands after its key for a mapping's or a list's element)."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return kind, ""
    for argument in typing.get_args(kind):
        if dataclasses.is_dataclass(argument) and isinstance(argument, type):
            suffixes = {dict: f".{NAME}", list: "[N]"}
            return argument, suffixes.get(typing.get_origin(kind) or kind, "")
    return None, ""


def _type_name(kind: Any) -> str:
    """Return a type as a user reads it: `int`, `list[str]`, `str | null`."""
    if kind is type(None):
        return "null"
    if kind is Any:
        return "any"
    origin, arguments = typing.get_origin(kind), [_type_name(argument) for argument in typing.get_args(kind)]
    if origin in (Union, types.UnionType):
        return " | ".join(arguments)
    return f"{origin.__name__}[{', '.join(arguments)}]" if origin else getattr(kind, "__name__", str(kind))


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _has_none(field: "dataclasses.Field[Any]") -> bool:
    """Return whether a field has no default: a user's own may have none, or OmegaConf's mark for that."""
    return field.default == "???" or field.default is MISSING and field.default_factory is MISSING


def _field(schema: type, name: str) -> "dataclasses.Field[Any]":
    return next(field for field in dataclasses.fields(schema) if field.name == name)


def _spelled(choices: Sequence[Any]) -> list[str]:
    return ['""' if choice == "" else str(choice) for choice in choices]
