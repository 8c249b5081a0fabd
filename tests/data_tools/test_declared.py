"""Declared settings: what is legal, what is refused and how, what is left alone, and what is described."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from data_tools.base import declared
from data_tools.base.declared import setting, with_default
from data_tools.mistake import Problem


@dataclass
class Inner:
    share: float = setting(0.5, "a share", least=0, most=1)
    kind: str = setting("plain", "a kind", choices=("", "plain", "fancy"))


@dataclass
class Outer:
    name: str = setting("", "a name", needed=True, free=True)
    count: int = setting(2, "a count", unit="rows", least=1)
    rate: float = setting(1.0, "a rate", above=0, below=2, keyed=False)
    rest: float = setting(0.0, "a pause, or none", least=5, also=[0])
    inner: Inner = setting(Inner, "another config", keyed=False)
    by_name: dict[str, Inner] = setting(dict, "configs by name")
    shares: dict[str, float] = setting(lambda: {"a": 1.0}, "shares", least=0, names=["a", "b"])
    kinds: list[str] = setting(list, "kinds", choices=["plain", "fancy"], keyed="if_set")
    maybe: int | None = setting(None, "a number, or none", most=3)
    options: dict[str, Any] = setting(dict, "anything", free=True)
    own: float = field(default=-1.0, metadata={"keyed": False})  # nothing is declared of it


@dataclass
class Derived(Outer):
    count: int = with_default(Outer, "count", 7)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"name": ""}, "name: is missing: a name"),
        ({"count": 0}, "count: 0 is out of range: at least 1 (rows)"),
        ({"rate": 2.0}, "rate: 2.0 is out of range: above 0, below 2"),
        ({"rate": float("nan")}, "rate: nan is out of range: above 0, below 2"),
        ({"rest": 4.0}, "rest: 4.0 is out of range: at least 5 or 0"),
        ({"rest": float("inf")}, "rest: inf is out of range: at least 5 or 0"),
        ({"inner": Inner(share=1.5)}, "inner.share: 1.5 is out of range: 0 to 1"),
        ({"by_name": {"x": Inner(kind="FANCY")}}, "by_name.x.kind: unknown value 'FANCY' (did you mean fancy? known: "),
        ({"shares": {"c": 1.0}}, "shares.c: unknown name (known: a, b)"),
        ({"shares": {"b": -1.0}}, "shares.b: -1.0 is out of range: at least 0"),
        ({"kinds": ["plain", "plane"]}, "kinds[1]: unknown value 'plane' (did you mean plain?"),
        ({"maybe": 4}, "maybe: 4 is out of range: at most 3"),
        ({"options": {"deep": [1.0, {"x": float("nan")}]}}, "options.deep[1].x: nan is out of range: a finite number"),
    ],
)
def test_a_value_that_is_not_legal_is_told_by_its_key(changes, told):
    (problem,) = declared.check(Outer(**{"name": "n", **changes}))
    assert str(problem).startswith(told)


def test_legal_values_and_what_nothing_is_declared_of_pass():
    config = Outer("n", rest=0, by_name={"x": Inner(0.0, "")}, kinds=["fancy"], own=float("nan"), options={"a": True})
    assert declared.check(config) == [] and declared.legal(config) is config


def test_a_phases_own_check_meets_legal_values_and_all_problems_are_told_at_once():
    given = Outer(count=-3, by_name={"x": Inner(share=-1)}, rate=1.5, kinds=["plain", "plane"])
    met = []

    def own(config):
        met.append(config)
        return [Problem("count", "seen already"), Problem("rate", "does not go with that")]

    found = declared.check_with(given, own)
    assert [problem.where for problem in found] == ["name", "count", "by_name.x.share", "kinds[1]", "rate"]
    other, default = met
    assert (default.count, default.rate, default.by_name["x"].share) == (2, 1.5, 0.5)
    assert default.kinds == ["plain"]  # of a list what is legal stays
    assert (other.count, other.by_name["x"].share) == (1, 0.0) and len(other.kinds) == 2
    assert given.count == -3 and given.by_name["x"].share == -1


def test_what_only_follows_from_a_value_that_stands_in_is_not_told():
    def own(config):
        wrong = [Problem("rate", f"is above {config.count}")] if config.rate > config.count - 2 else []
        return wrong + ([Problem("kinds", "two are too many")] if len(config.kinds) == 2 else [])

    found = declared.check_with(Outer("n", count=-3, kinds=["plain", "plane"]), own)
    assert [problem.where for problem in found] == ["count", "kinds[1]"]


def test_a_phases_own_check_may_fail_where_a_setting_is_missing_and_nowhere_else():
    def own(config):
        return [Problem("name", f"begins with {config.name[0]}")]

    assert [problem.where for problem in declared.check_with(Outer(), own)] == ["name"]
    for legal_or_not in (Outer("n"), Outer("n", count=-3)):
        with pytest.raises(ZeroDivisionError):
            declared.check_with(legal_or_not, lambda config: 1 // 0)


def test_a_users_frozen_config_is_checked_too():
    @dataclass(frozen=True)
    class Frozen:
        rows: int = declared.setting(1, "rows", least=1)

    assert [str(problem) for problem in declared.check_with(Frozen(0), lambda config: [])] == [
        "rows: 0 is out of range: at least 1"
    ]


def test_a_setting_is_described_with_those_below_it():
    found = {each.key: each for each in declared.describe(Derived)}
    assert list(found)[:6] == ["name", "count", "rate", "rest", "inner", "inner.share"]
    assert (found["count"].type, found["count"].default, found["count"].unit) == ("int", 7, "rows")
    assert (found["count"].legal, found["count"].help) == ("at least 1", "a count")
    assert found["inner.kind"].legal == '"" | plain | fancy' and found["by_name.NAME.share"].legal == "0 to 1"
    assert [found[key].keyed for key in ("count", "rate", "inner", "inner.share", "kinds")] == [
        True, False, False, False, "if_set"
    ]  # fmt: skip
    assert [found[key].type for key in ("inner", "by_name", "shares", "maybe", "options")] == [
        "mapping", "mapping", "dict[str, float]", "int | null", "dict[str, any]"
    ]  # fmt: skip
    assert found["own"].help == "" and found["own"].default == -1.0 and found["name"].needed


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**400, 10**5000], ids=lambda n: f"{n.bit_length()} bits")
def test_a_whole_number_beyond_64_bits_is_refused_and_said_in_a_short_line(number):
    """Python makes no float of it, and no text of thousands of digits. What has no bound of its own is refused, too."""

    @dataclass
    class Sizes:
        bounded: int = setting(1, "a size", least=1)
        open: int = setting(1, "any number", free=True)

    told = declared.check(Sizes(number, number))
    assert [problem.where for problem in told] == ["bounded", "open"]
    assert all("64 bits" in problem.message and len(problem.message) < 120 for problem in told)
