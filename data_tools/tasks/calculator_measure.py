"""Counts of what the calculator marks in GSM8K-schema lines are like: from GSM8K's own, calculator_tables.py was
made."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_tools.tasks.calculator import canonical, parse_line, verify
from data_tools.tasks.calculator_expressions import fraction_kind, pattern, roles
from data_tools.tasks.task import Row

_OPERAND = re.compile(r"\d+(?:\.\d+)?")


@dataclass
class Proportions:
    """Counts over the marks of some lines; `share` turns one table into proportions."""

    marks: int = 0
    operations: Counter[int] = field(default_factory=Counter)  # operations per mark: the length of the chain
    operators: Counter[str] = field(default_factory=Counter)  # over all operations
    shapes: Counter[str] = field(default_factory=Counter)  # the expression with n for each operand
    # shape of one operation → patterns of its two operands
    pairs: dict[str, Counter[str]] = field(default_factory=dict)
    # in longer chains: operator before the operand (^ first, n alone) → pattern
    operands: dict[str, Counter[str]] = field(default_factory=dict)
    digits: Counter[int] = field(default_factory=Counter)  # digits of the whole part, over all operands
    decimals: Counter[int] = field(default_factory=Counter)  # decimal places, over all operands
    answer_decimals: Counter[int] = field(default_factory=Counter)
    single_digit: Counter[str] = field(default_factory=Counter)
    leading_digit: Counter[str] = field(default_factory=Counter)  # of whole operands with two digits or more
    last_decimal: Counter[str] = field(default_factory=Counter)
    # of products and quotients: is the answer not whole
    fractional_answers: dict[str, Counter[bool]] = field(default_factory=dict)
    marks_per_line: Counter[int] = field(default_factory=Counter)


def share(counts: Mapping[Any, int]) -> dict[Any, float]:
    """Return counts as proportions of their sum."""
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}


def measure(lines: Iterable[str]) -> Proportions:
    """Return the proportions of the verified marks in GSM8K-schema lines: what calculator_tables.py was taken with."""
    out = Proportions()
    for row in _verified_rows(lines, out.marks_per_line):
        out.marks += 1
        expression, answer = row.prompt[:-1], row.answer
        numbers = _OPERAND.findall(expression)
        shape = _OPERAND.sub("n", expression)
        operators = re.findall(r"(?<=[n)])[-+*/]", shape)
        out.shapes[shape] += 1
        out.operations[len(operators)] += 1
        out.operators.update(operators)
        patterns = [pattern(number) for number in numbers]
        if len(numbers) == 2 and len(shape) == 3:
            out.pairs.setdefault(shape, Counter())[" ".join(patterns)] += 1
        else:
            for role, form in zip(roles(shape), patterns):
                out.operands.setdefault(role, Counter())[form] += 1
        out.answer_decimals[len(answer.partition(".")[2])] += 1
        for number in numbers:
            whole, _, decimals = number.partition(".")
            out.digits[len(whole)] += 1
            out.decimals[len(decimals)] += 1
            if decimals:
                out.last_decimal[decimals[-1]] += 1
            elif len(whole) > 1:
                out.leading_digit[whole[0]] += 1
            elif whole != "0":
                out.single_digit[whole] += 1
        kind = fraction_kind(shape, numbers)
        if kind is not None:
            out.fractional_answers.setdefault(kind, Counter())["." in answer] += 1
    return out


def _verified_rows(lines: Iterable[str], marks_per_line: Counter[int]) -> Iterator[Row]:
    for line in lines:
        rows = parse_line(line)
        marks_per_line[len(rows)] += 1
        yield from (canonical(row) for row in rows if verify(row) is None)
