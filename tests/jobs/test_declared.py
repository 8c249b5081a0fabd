"""Every setting of every phase kind is declared, and no value out of its range gets past a plan, whatever the kind."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from data_tools.base import declared
from data_tools.base.declared import NAME, Declaration, describe
from jobs.kind import PhaseKind, Placement, find_kind, kind_names
from jobs.schema.problems import Problems
from jobs.schema.typed import structured
from megatron_ext.entrypoints import certify
from slurm.profile.schema import Request

ANY_LEAF = {int, float, str, Any}  # kinds of values of which not all may be legal
CONFIGS = [*((name, find_kind(name).config) for name in kind_names()), ("certify", certify.Config)]


def leaves(schema: type, where: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]", set[Any]]]:
    """(dotted key, field, types of its elements) of each setting, nested ones too."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        nested, name = declared._nested(hints[field.name])
        key = f"{where}.{field.name}" if where else field.name
        yield key, field, set() if nested else elements(hints[field.name])
        if nested:
            yield from leaves(nested, key + name)


def elements(kind: Any) -> set[Any]:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        arguments = arguments[1:]
    return set().union(*map(elements, arguments)) if arguments else {kind}


@pytest.mark.parametrize("name, config", CONFIGS, ids=[name for name, _ in CONFIGS])
def test_every_setting_has_help_and_what_is_legal_is_known(name, config):
    for key, field, kinds in leaves(config):
        known = declared.declaration_of(field)
        assert known and known.help, f"{name}: {key} has no help"
        if kinds & ANY_LEAF:
            path = field.metadata.get("input") or field.metadata.get("module")
            assert known.legal or known.free or path, f"{name}: what {key} may be is not declared"
            assert not (known.legal and known.free), f"{name}: {key} has a range and says that every value is legal"


@pytest.mark.parametrize("name, config", [*CONFIGS, ("resources", Request)], ids=lambda value: str(value))
def test_every_setting_has_an_example_that_is_taken_and_every_number_a_unit(name, config):
    """A count of something says of what; a number without a unit is a pure one, and so is what draws."""
    for described in describe(config):
        *above, last = described.key.split(".")
        if described.type == "mapping":
            continue
        assert described.example is not None, f"{name}: {described.key} has no example"
        assert described.type != "int" or described.unit or last.endswith("seed"), (
            f"{name}: {described.key} has no unit"
        )
        given = described.example
        for part in reversed([*above, last]):
            given = {part if part != NAME else "x": given}
        problems = Problems(Path("p.yaml"))
        text = re.sub(r"\$\{phases\.\w+\.out\}", "folder", yaml.safe_dump(given))  # what the pipeline puts there
        typed = structured(problems, "with", config, yaml.safe_load(text))
        told = [problem for problem in declared.check(typed) if problem.where == described.key.replace(NAME, "x")]
        assert not problems.noted and not told, (name, described.key, described.example, problems.noted, told)
        assert described.example != described.default, f"{name}: {described.key}"


def wrong_values(known: Declaration, kinds: set[Any]) -> list[Any]:
    if known.choices:
        return ["no such choice"]
    bounds = ((known.least, -1), (known.above, 0), (known.most, 1), (known.below, 0))
    wrong = [type_of(kinds)(bound + beyond) for bound, beyond in bounds if bound is not None]
    return [*(value for value in wrong if value not in known.also), *([float("nan")] if float in kinds else [])]


def type_of(kinds: set[Any]) -> type:
    return float if float in kinds else int


def config_with(schema: type, key: str, value: Any, name: str) -> tuple[Any, str]:
    """(a config whose setting `key` is `value`, or has it in a list or as `name` in a mapping; the key to be told)."""
    config = owner = schema()
    kind: Any = schema
    path: list[str] = []
    *above, last = key.split(".")
    for part in above:
        if part == NAME:  # an entry of the mapping that the last part named
            kind, part = typing.get_args(kind)[1], "x"
            owner[part] = kind()
            owner = owner[part]
        else:
            kind, owner = typing.get_type_hints(type(owner))[part], getattr(owner, part)
        path.append(part)
    holder = typing.get_origin(typing.get_type_hints(type(owner))[last])
    setattr(owner, last, {list: [value], dict: {name: value}}.get(holder, value))
    return config, ".".join([*path, last]) + {list: "[0]", dict: f".{name}"}.get(holder, "")


def test_a_users_own_kind_is_held_to_what_it_declares_though_it_has_no_check():
    @dataclasses.dataclass
    class Config:
        rows: int = declared.setting(1, "rows to write", least=1)
        plain: int = -1  # of which nothing is declared

    kind = PhaseKind("my.phase", SimpleNamespace(Config=Config))
    assert not kind.check(Config(), Placement(1))
    assert [str(problem) for problem in kind.check(Config(rows=0), Placement(1))] == [
        "rows: 0 is out of range: at least 1"
    ]


@pytest.mark.parametrize("name", kind_names())
def test_no_kind_takes_a_value_that_is_not_legal(name):
    """Evaluation took `backend: TE` and `dtype: bfloat17`, and failed hours later."""
    kind = find_kind(name)
    for key, field, kinds in leaves(kind.config):
        for value in wrong_values(declared.declaration_of(field), kinds):
            name_of = next(iter(declared.declaration_of(field).names), "x")
            config, told = config_with(kind.config, key, value, name_of)
            wheres = [problem.where for problem in kind.check(config, Placement(1))]
            assert wheres.count(told) == 1, f"{name}: {told} = {value!r}"
            kind.forecast(config, Placement(1))
