"""What an answer can be: a number, a measure, a formula, a letter, words, and what is made of these."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from data_tools.answers.units import Unit


@dataclass(frozen=True)
class Number:
    value: Fraction
    places: int | None = None  # decimals, of a decimal number


@dataclass(frozen=True)
class Formula:
    expression: Any  # of sympy
    mark: str | None  # its fingerprint, None where it has none


@dataclass(frozen=True)
class Measure:
    value: "Number | Formula | Words"  # words: a time of day
    percent: bool = False
    unit: Unit | None = None


@dataclass(frozen=True)
class Letter:
    text: str
    label: bool  # of a choice, (B) or \text{B}; a variable otherwise


@dataclass(frozen=True)
class Words:
    """Represents words, a time of day or a number with its base: equal where they are written alike."""

    text: str


@dataclass(frozen=True)
class Named:
    name: str
    value: Any


@dataclass(frozen=True)
class Group:
    """Represents a tuple (), an open or closed interval, a row []: `brackets` tells.

    (1,2) is a point or an interval.
    """

    brackets: str
    items: tuple


@dataclass(frozen=True)
class Several:
    """Represents values in no order, those of a set each once. `union` says that they are intervals."""

    items: tuple
    distinct: bool = False
    union: bool = False


@dataclass(frozen=True)
class Matrix:
    rows: tuple


@dataclass(frozen=True)
class Relation:
    """Represents an equation or inequality between formulas."""

    expression: Any
    mark: str | None


class Unclear(ValueError):
    """Raised where it is not certain what an answer says."""
