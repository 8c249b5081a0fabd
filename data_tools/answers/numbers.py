"""Numbers as people and models write them, read exactly: 1,234.5, 1e-05, 6.02\\times10^{23}, 3 1/2, 0.1\\overline{6},
12/5.

A space separates thousands (`1 000`) or a fraction (`3 1/2`), or what stands there is no number: `1 2` is not 12.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from data_tools.answers.units import CURRENCIES, MULTIPLIERS, Unit, unit_of

LARGEST_EXPONENT = 1000  # of ten; a number beyond it is not written out

_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|[1-9]\d{0,2}(?:'\d{3})+(?!\d)|[1-9]\d{0,2}(?: \d{3})+(?! ?\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_MAGNITUDE = re.compile(
    rf"(?P<whole>\d+) ?\\frac\{{ ?(?P<over>\d+) ?\}}\{{ ?(?P<under>\d+) ?\}}"  # 3\frac{1}{2}
    rf"|(?P<whole2>\d+) (?P<over2>\d+) ?/ ?(?P<under2>\d+)"  # 3 1/2
    rf"|\\frac\{{ ?(?P<sign>[-+]?) ?(?P<top>{_DECIMAL}) ?\}}\{{ ?(?P<sign2>[-+]?) ?(?P<bottom>{_DECIMAL}) ?\}}"
    r"|(?P<before>\d*)\.(?P<once>\d*?)"
    r"(?:\\(?:overline|bar) ?\{(?P<again>\d+)\}|\\dot ?\{?(?P<again2>\d)\}?|\((?P<again3>\d+)\)"
    r"|(?P<again4>\d)(?P=again4){2,}\\ldots)"
    rf"|(?P<mantissa>{_DECIMAL})(?:[eE](?P<e>[-+]?\d+)(?![\d.])|"
    r" ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{ ?(?P<e2>[-+]?\d+) ?\}|(?P<e3>[-+]?\d+)))"
    r"|10 ?\^ ?(?:\{ ?(?P<e4>[-+]?\d+) ?\}|(?P<e5>[-+]?\d+))"
    rf"|(?P<top2>{_DECIMAL}) ?/ ?(?P<bottom2>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL})"
)
_PREFIX = re.compile(rf"(?P<sign>[-+]?) ?(?:⟦? ?(?P<currency>[{CURRENCIES}]) ?⟧? ?(?P<sign2>[-+]?) ?)?")
_ORDINAL = re.compile(r"(?:\^ ?\{? ?)?⟦? ?(?:st|nd|rd|th) ?⟧?(?: ?\})?")
_MODULUS = re.compile(r"\(?(?:\\pmod|\\bmod|\\mod|⟦ ?mod ?⟧|mod) ?\{? ?\d+ ?\}? ?\)?")
_PERCENT = re.compile(r"(?:⟦ ?)?(?:%|percent|percentage|pct)(?: ?⟧)?")


class Reading(NamedTuple):
    """Represents a number. `places` are its decimals; None where it is written otherwise, such as a fraction."""

    value: Fraction
    places: int | None = None
    percent: bool = False
    unit: Unit | None = None


def number(text: str) -> Reading | None:
    """Return the number that the whole text is, with what it measures; None where the text is anything else.

    Raise ValueError for what looks like a number and is not one, such as 2\\frac{3}{2}, which may be 3 or 3.5.
    """
    prefix = _PREFIX.match(text)
    match = _MAGNITUDE.match(text, prefix.end()) if prefix else None
    if prefix is None or match is None:
        return None
    value, places = _value({name: part for name, part in match.groupdict().items() if part})
    if "-" in (prefix["sign"], prefix["sign2"]):
        value = -value
    rest = text[match.end() :]
    unit = unit_of(prefix["currency"]) if prefix["currency"] else None
    if found := re.match(rf" ?⟦? ?({'|'.join(MULTIPLIERS)})(?![a-z])", rest):
        value, places, rest = value * MULTIPLIERS[found[1]], None, rest[found.end() :].replace("⟧", "", 1)
    stripped = rest.strip()
    if not stripped or _MODULUS.fullmatch(stripped):
        return Reading(value, places, unit=unit)
    if _ORDINAL.fullmatch(stripped) and value.denominator == 1 and unit is None:
        return Reading(value, None)
    if _PERCENT.fullmatch(stripped):
        return Reading(value, places, True)
    if unit is None and (measured := _measured(rest)):
        return Reading(value, places, unit=measured)
    if unit is not None and unit_of(stripped) == unit:  # $5 dollars
        return Reading(value, places, unit=unit)
    return None


def _measured(rest: str) -> Unit | None:
    """Return the unit after a number: a letter only where a space or \\text{} sets it off, for 5m may be a product."""
    unit = unit_of(rest)
    apart = rest[:1] in (" ", "⟦", "^", "¢", *CURRENCIES)
    word = rest.strip(" ⟦⟧")
    known = unit is not None and not (unit[0].isalpha() and unit[0].startswith(word[:3].lower()))
    return unit if apart or (unit and known and len(word) > 1) else None


def _value(parts: dict[str, str]) -> tuple[Fraction, int | None]:
    """Return (value, decimals) of the parts of _MAGNITUDE that are there, by name; decimals as in Reading.

    Raise ValueError for what looks like a number and is none.
    """

    def first(*names: str) -> str:
        return next((parts[name] for name in names if name in parts), "")

    if whole := first("whole", "whole2"):
        over, under = first("over", "over2"), first("under", "under2")
        if not int(over) < int(under):
            raise ValueError(f"{whole} and {over}/{under} is no mixed number")
        return int(whole) + Fraction(int(over), int(under)), None
    if top := first("top", "top2"):
        bottom = first("bottom", "bottom2")
        if _decimal(bottom) == 0:
            raise ValueError("a fraction of zero")
        sign = -1 if (first("sign") == "-") != (first("sign2") == "-") else 1
        return sign * _decimal(top) / _decimal(bottom), None
    if again := first("again", "again2", "again3", "again4"):
        once = first("once")
        period = Fraction(int(again), 10 ** len(once) * (10 ** len(again) - 1))
        return Fraction(int((first("before") or "0") + once), 10 ** len(once)) + period, None
    if exponent := first("e", "e2", "e3", "e4", "e5"):
        if abs(int(exponent[:6])) > LARGEST_EXPONENT:
            raise ValueError(f"10^{exponent} is not written out")
        return _decimal(first("mantissa") or "1") * Fraction(10) ** int(exponent), None
    decimal = first("decimal")
    return _decimal(decimal), len(decimal.partition(".")[2])


def _decimal(text: str) -> Fraction:
    whole, _, decimals = re.sub(r"[ ,']", "", text).partition(".")
    return Fraction(int((whole or "0") + decimals), 10 ** len(decimals))
