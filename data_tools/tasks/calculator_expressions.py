"""Expressions for the calculator task, drawn by the measured proportions of calculator_tables.py."""

import hashlib
import re
import struct
from bisect import bisect
from collections.abc import Mapping
from itertools import accumulate

from data_tools.tasks.arithmetic import format_number, read
from data_tools.tasks.calculator_tables import (
    FRACTIONAL_ANSWERS,
    LAST_DECIMAL,
    LEADING_DIGIT,
    OPERANDS,
    OTHER,
    PAIRS,
    SHAPES,
    SINGLE_DIGIT,
)

MAX_PLACES = 2  # decimals of a synthetic answer; 6 of GSM8K's 23,716 have 3


class Draws:
    """Represents an endless stream of uniform numbers that is a pure function of its key (blake2b in counter mode)."""

    def __init__(self, *key: object):
        self.key = ":".join(map(str, key))
        self.block = 0
        self.words: list[int] = []

    def unit(self) -> float:
        """Return a number that is uniform in [0, 1), of 32 bits."""
        if not self.words:
            digest = hashlib.blake2b(f"{self.key}:{self.block}".encode(), digest_size=64).digest()
            self.words = list(struct.unpack("<16I", digest))
            self.block += 1
        return self.words.pop() / 2**32

    def integer(self, low: int, high: int) -> int:
        """Return an integer that is uniform in [low, high], both included."""
        return low + int(self.unit() * (high - low + 1))


class _Table:
    """Represents a measured table, ready to draw from."""

    def __init__(self, weights: Mapping[str, float]):
        self.names = list(weights)
        self.ends = list(accumulate(weights.values()))

    def draw(self, draws: Draws) -> str:
        return self.names[min(bisect(self.ends, draws.unit() * self.ends[-1]), len(self.names) - 1)]


def draw_expression(draws: Draws) -> str:
    """Return one canonical expression by the tables. The shape is drawn once, its operands until the answer is a nice
    one."""
    shape = _SHAPES.draw(draws)
    while True:
        patterns = _patterns(shape, draws)
        kind = fraction_kind(shape, patterns)
        fractional = kind is not None and draws.unit() < FRACTIONAL_ANSWERS[kind]
        for _ in range(_PATTERN_TRIES):
            for _ in range(_NUMBER_TRIES):
                expression = _fill(shape, patterns, kind == "whole operands" and not fractional, draws)
                answer = _nice_answer(expression)
                if answer is not None and (kind is None or fractional == ("." in answer)):
                    return expression
            patterns = _patterns(shape, draws)
            while fraction_kind(shape, patterns) != kind:
                patterns = _patterns(shape, draws)


# Patterns that rarely give a nice answer (3-50, a tenth of a multiple of ten that is to be a fraction) are drawn anew,
# of the same kind first, so that refusals do not wear down the proportion of fractions.
_NUMBER_TRIES, _PATTERN_TRIES = 32, 8


def _fill(shape: str, patterns: list[str], exact: bool, draws: Draws) -> str:
    """Return the shape with a number of each pattern; `exact` makes the dividend of `n/n` a multiple of its divisor."""
    numbers = [_number(form, draws) for form in patterns]
    if exact and shape == "n/n":
        numbers[0] = _multiple(patterns[0], int(numbers[1]), draws)
    operands = iter(numbers)
    return "".join(next(operands) if part == "n" else part for part in shape)


def _nice_answer(expression: str) -> str | None:
    """Return the answer where it is one GSM8K would have: not negative, at most MAX_PLACES decimals."""
    try:
        value, _ = read(expression)
    except ValueError:  # division by zero
        return None
    answer = format_number(value)
    if answer is None or value < 0 or len(answer.partition(".")[2]) > MAX_PLACES:
        return None
    return answer


def _patterns(shape: str, draws: Draws) -> list[str]:
    """Return the patterns of a shape's operands: jointly for one operation, else each by the operator before it."""
    if shape in _PAIRS:
        pair = _PAIRS[shape].draw(draws)
        return [_OTHER.draw(draws) for _ in range(2)] if pair == "other" else pair.split()
    return [_OPERANDS[role].draw(draws) for role in roles(shape)]


def roles(shape: str) -> list[str]:
    """Return for each operand the operator before it, `^` for the first one, `n` for a lone one."""
    return ["n"] if shape == "n" else [before or "^" for before in re.findall(r"([-+*/]?)\(*n", shape)]


def fraction_kind(shape: str, operands: list[str]) -> str | None:
    """Return which row of FRACTIONAL_ANSWERS a mark belongs to; None where sums and whole products leave no choice."""
    if any("." in operand for operand in operands):
        return "decimal operands" if "*" in shape or "/" in shape else None
    return "whole operands" if "/" in shape else None


def pattern(number: str) -> str:
    """Return the form of a canonical number: d for a digit, trailing zeros kept: 12 → dd, 1200 → dd00, 0.25 → 0.dd."""
    whole, point, decimals = number.partition(".")
    if point:
        return ("0" if whole == "0" else "d" * len(whole)) + "." + "d" * len(decimals)
    significant = len(number.rstrip("0"))
    return "d" * significant + "0" * (len(number) - significant)


def _number(form: str, draws: Draws) -> str:
    """Return a number of the given pattern, digits by the measured tables."""
    whole, point, decimals = form.partition(".")
    if point:
        digits = _digits(len(whole), draws, last_nonzero=False) if whole != "0" else "0"
        middle = "".join(str(draws.integer(0, 9)) for _ in decimals[1:])
        return f"{digits}.{middle}{_LAST_DECIMAL.draw(draws)}"
    if form == "d":
        return _SINGLE_DIGIT.draw(draws)
    significant = form.count("d")
    return _digits(significant, draws, last_nonzero=True) + form[significant:] if significant else form


def _digits(count: int, draws: Draws, last_nonzero: bool) -> str:
    if count == 1:
        return _LEADING_DIGIT.draw(draws)
    middle = "".join(str(draws.integer(0, 9)) for _ in range(count - 2))
    return _LEADING_DIGIT.draw(draws) + middle + str(draws.integer(int(last_nonzero), 9))


def _multiple(form: str, divisor: int, draws: Draws) -> str:
    """Return a multiple of the divisor with the given pattern where a few draws find one, else the last one tried."""
    number = "0"
    for _ in range(_NUMBER_TRIES):
        target = int(_number(form, draws))
        number = str(max(1, round(target / max(1, divisor))) * divisor)
        if pattern(number) == form:
            break
    return number


_SHAPES = _Table(SHAPES)
_OTHER = _Table(OTHER)
_PAIRS = {shape: _Table(table) for shape, table in PAIRS.items()}
_OPERANDS = {role: _Table(table) for role, table in OPERANDS.items()}
_SINGLE_DIGIT, _LEADING_DIGIT, _LAST_DECIMAL = map(_Table, (SINGLE_DIGIT, LEADING_DIGIT, LAST_DECIMAL))
