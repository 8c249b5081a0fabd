"""The calculator task: `48/2=` must be continued with `24`.

Rows come from two places of one form:
* JSONL files of GSM8K's schema {"question", "answer"}, whose answers hold calculator marks: `... is <<48/2=24>>24`;
* a seeded generator whose marks follow the proportions of GSM8K's training marks. The tables at the end of this
  file are those proportions; `measure` takes them again from any set of lines, the generator's own included.

An expression is held out when the hash of its canonical spelling says so (1 of HELDOUT_SHARE): the generator's
`train` split never yields one, its `heldout` split yields nothing else.
"""

import hashlib
import json
import re
import struct
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from data_tools.records.json_text import json_value
from data_tools.tasks.arithmetic import format_number, parse_number, read
from data_tools.tasks.task import SPLITS, Item, Row

ALPHABET = "0123456789.+-*/()="
HELDOUT_SHARE = 16
MAX_PLACES = 2  # decimals of a synthetic answer; 6 of GSM8K's 23,716 have 3

REWARDS = {"correct": 1.0}
HUB = "openai/gsm8k:main/train-*.parquet"

_MARK = re.compile(r"<<(.*?)>>", re.DOTALL)
_SUM = re.compile(r"[\d.]+[-+][\d.]+=")
_OPERAND = re.compile(r"\d+(?:\.\d+)?")


@dataclass
class Options:
    """`reverse_digits`: the model writes answers last character first (`24` as `42`), the order of carries."""

    reverse_digits: bool = False


# ---- rows of a file ----------------------------------------------------------------------------------------------


def parse_line(line: str) -> list[Row]:
    """Return the calculator marks of one GSM8K-schema line; none is legal. Raise ValueError with the reason if malformed."""
    return _marks(json_value(line))


def _marks(record: Any) -> list[Row]:
    """Return the calculator marks of a GSM8K record. Raise ValueError with the reason where it is none."""
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but a {type(record).__name__}")
    if not isinstance(record.get("answer"), str):
        found = "no" if "answer" not in record else f"a {type(record['answer']).__name__} as"
        raise ValueError(f"{found} answer; GSM8K's schema has the strings question and answer")
    rows = []
    for mark in _MARK.findall(record["answer"]):
        expression, equals, answer = mark.rpartition("=")
        rows.append(Row(expression + equals, answer) if equals else Row(mark, ""))
    return rows


def verify(row: Row) -> str | None:
    """None when the answer is exactly the expression's value, else `unparsable` or `wrong_answer`.

    The answer may itself be an expression (GSM8K's test split has `3/4=3/4`). A value without a finite decimal has
    no right answer here: all 27,998 marks of GSM8K are exact.
    """
    try:
        value, _ = read(row.prompt.removesuffix("="))
        answer, _ = read(row.answer)
    except ValueError:
        return "unparsable"
    return None if value == answer and format_number(value) is not None else "wrong_answer"


def canonical(row: Row) -> Row:
    """Numbers in their shortest spelling (75.00 → 75, .5 → 0.5) and nothing around them; for verified rows."""
    value, expression = read(row.prompt.removesuffix("="))
    return Row(expression + "=", format_number(value) or row.answer)


def encode_answer(answer: str, options: Options) -> str:
    return answer[::-1] if options.reverse_digits else answer


def decode_answer(text: str, options: Options) -> str:
    return text[::-1] if options.reverse_digits else text


def is_correct(answer: str, completion: str, options: Options) -> bool:
    """Whether the completion is one number, numerically equal to the answer (exact rationals, no tolerance).

    An expression is no answer: a model that repeats `48/2` has not calculated.
    """
    written = parse_number(decode_answer(completion, options))
    return written is not None and written == parse_number(answer)


def kind(row: Row) -> str:
    """What evaluations tell apart: a sum or difference of two numbers, or anything else."""
    return "single_operation_sums" if _SUM.fullmatch(row.prompt) else "others"


# ---- prompts to score ---------------------------------------------------------------------------------------------


def items(record: "dict[str, Any] | Row", options: Options) -> list[Item]:
    """The marks of a GSM8K record that are right, or a row of the generator's."""
    if isinstance(record, Row):
        rows = [record]
    else:
        rows = [canonical(row) for row in _marks(record) if verify(row) is None]
    return [Item.of(row.prompt, row.answer) for row in rows]


def left_out(record: "dict[str, Any] | Row") -> list[str]:
    """Return why marks of a record give no prompt, a bucket each."""
    rows = [] if isinstance(record, Row) else _marks(record)
    return [bucket for row in rows if (bucket := verify(row)) is not None]


def rewards(item: Item, completion: str, options: Options) -> dict[str, float]:
    return {"correct": float(is_correct(item.answer, completion, options))}


def final_answer(item: Item, completion: str, options: Options) -> str | None:
    written = parse_number(decode_answer(completion, options))
    return None if written is None else str(written)


# ---- the generator -----------------------------------------------------------------------------------------------


def is_heldout(expression: str) -> bool:
    """Whether the generator keeps this expression out of its `train` split: by hash of the canonical spelling.

    `3*4` and `4*3` are two expressions.
    """
    return _is_heldout(read(expression)[1])


def _is_heldout(spelled: str) -> bool:
    return hashlib.blake2b(spelled.encode(), digest_size=8).digest()[0] % HELDOUT_SHARE == 0


class _Draws:
    """An endless stream of uniform numbers that is a pure function of its key (blake2b in counter mode)."""

    def __init__(self, *key: object):
        self.key = ":".join(map(str, key))
        self.block = 0
        self.words: list[int] = []

    def unit(self) -> float:
        """Uniform in [0, 1), 32 bits."""
        if not self.words:
            digest = hashlib.blake2b(f"{self.key}:{self.block}".encode(), digest_size=64).digest()
            self.words = list(struct.unpack("<16I", digest))
            self.block += 1
        return self.words.pop() / 2**32

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high], both included."""
        return low + int(self.unit() * (high - low + 1))


class _Table:
    """A measured table, ready to draw from."""

    def __init__(self, weights: Mapping[str, float]):
        self.names = list(weights)
        self.ends = list(accumulate(weights.values()))

    def draw(self, draws: _Draws) -> str:
        return self.names[min(bisect(self.ends, draws.unit() * self.ends[-1]), len(self.names) - 1)]


def synthetic_row(seed: int, index: int, split: str) -> Row:
    """Row `index` (from 0) of a split's endless stream: canonical, right, and on its side of `is_heldout`."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; valid: {', '.join(SPLITS)}")
    draws = _Draws("calculator", seed, split, index)
    while True:
        expression = _expression(draws)
        if _is_heldout(expression) == (split == "heldout"):
            return Row(expression + "=", format_number(read(expression)[0]) or "")


def synthetic_line(seed: int, index: int, split: str) -> str:
    """Line `index` of the same stream in GSM8K's schema: line 0 holds rows 0.., line 1 the next ones, and so on.

    The number of marks runs through a fixed cycle of 100 lines (MARKS_PER_LINE), so that a line finds its rows
    without its predecessors.
    """
    cycles, place = divmod(index, len(_LINE_STARTS) - 1)
    first = cycles * _LINE_STARTS[-1] + _LINE_STARTS[place]
    count = _LINE_STARTS[place + 1] - _LINE_STARTS[place]
    rows = [synthetic_row(seed, first + offset, split) for offset in range(count)]
    steps = "\n".join(f"{row.prompt}<<{row.prompt}{row.answer}>>{row.answer}" for row in rows)
    question = "What is " + ", then ".join(row.prompt[:-1] for row in rows) + "?"
    return json.dumps({"question": question, "answer": f"{steps}\n#### {rows[-1].answer}"})


def _expression(draws: _Draws) -> str:
    """One canonical expression by the tables. The shape is drawn once, its operands until the answer is a nice one."""
    shape = _SHAPES.draw(draws)
    while True:
        patterns = _patterns(shape, draws)
        kind = _fraction_kind(shape, patterns)
        fractional = kind is not None and draws.unit() < FRACTIONAL_ANSWERS[kind]
        for _ in range(_PATTERN_TRIES):
            for _ in range(_NUMBER_TRIES):
                expression = _fill(shape, patterns, kind == "whole operands" and not fractional, draws)
                answer = _nice_answer(expression)
                if answer is not None and (kind is None or fractional == ("." in answer)):
                    return expression
            patterns = _patterns(shape, draws)
            while _fraction_kind(shape, patterns) != kind:
                patterns = _patterns(shape, draws)


# Patterns that rarely give a nice answer (3-50, a tenth of a multiple of ten that is to be a fraction) are drawn anew,
# of the same kind first, so that refusals do not wear down the proportion of fractions.
_NUMBER_TRIES, _PATTERN_TRIES = 32, 8


def _fill(shape: str, patterns: list[str], exact: bool, draws: _Draws) -> str:
    """The shape with a number of each pattern; `exact` makes the dividend of `n/n` a multiple of its divisor."""
    numbers = [_number(form, draws) for form in patterns]
    if exact and shape == "n/n":
        numbers[0] = _multiple(patterns[0], int(numbers[1]), draws)
    operands = iter(numbers)
    return "".join(next(operands) if part == "n" else part for part in shape)


def _nice_answer(expression: str) -> str | None:
    """The answer where it is one GSM8K would have: not negative, at most MAX_PLACES decimals."""
    try:
        value, _ = read(expression)
    except ValueError:  # division by zero
        return None
    answer = format_number(value)
    if answer is None or value < 0 or len(answer.partition(".")[2]) > MAX_PLACES:
        return None
    return answer


def _patterns(shape: str, draws: _Draws) -> list[str]:
    """The patterns of a shape's operands: jointly for one operation, else each by the operator before it."""
    if shape in _PAIRS:
        pair = _PAIRS[shape].draw(draws)
        return [_OTHER.draw(draws) for _ in range(2)] if pair == "other" else pair.split()
    return [_OPERANDS[role].draw(draws) for role in _roles(shape)]


def _roles(shape: str) -> list[str]:
    """For each operand the operator before it, `^` for the first one, `n` for a lone one."""
    return ["n"] if shape == "n" else [before or "^" for before in re.findall(r"([-+*/]?)\(*n", shape)]


def _fraction_kind(shape: str, operands: list[str]) -> str | None:
    """Which row of FRACTIONAL_ANSWERS a mark belongs to; None where sums and whole products leave no choice."""
    if any("." in operand for operand in operands):
        return "decimal operands" if "*" in shape or "/" in shape else None
    return "whole operands" if "/" in shape else None


def pattern(number: str) -> str:
    """The form of a canonical number: d for a digit, trailing zeros kept: 12 → dd, 1200 → dd00, 0.25 → 0.dd."""
    whole, point, decimals = number.partition(".")
    if point:
        return ("0" if whole == "0" else "d" * len(whole)) + "." + "d" * len(decimals)
    significant = len(number.rstrip("0"))
    return "d" * significant + "0" * (len(number) - significant)


def _number(form: str, draws: _Draws) -> str:
    """A number of the given pattern, digits by the measured tables."""
    whole, point, decimals = form.partition(".")
    if point:
        digits = _digits(len(whole), draws, last_nonzero=False) if whole != "0" else "0"
        middle = "".join(str(draws.integer(0, 9)) for _ in decimals[1:])
        return f"{digits}.{middle}{_LAST_DECIMAL.draw(draws)}"
    if form == "d":
        return _SINGLE_DIGIT.draw(draws)
    significant = form.count("d")
    return _digits(significant, draws, last_nonzero=True) + form[significant:] if significant else form


def _digits(count: int, draws: _Draws, last_nonzero: bool) -> str:
    if count == 1:
        return _LEADING_DIGIT.draw(draws)
    middle = "".join(str(draws.integer(0, 9)) for _ in range(count - 2))
    return _LEADING_DIGIT.draw(draws) + middle + str(draws.integer(int(last_nonzero), 9))


def _multiple(form: str, divisor: int, draws: _Draws) -> str:
    """A multiple of the divisor with the given pattern where a few draws find one, else the last one tried."""
    number = "0"
    for _ in range(_NUMBER_TRIES):
        target = int(_number(form, draws))
        number = str(max(1, round(target / max(1, divisor))) * divisor)
        if pattern(number) == form:
            break
    return number


# ---- the proportions of GSM8K ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proportions:
    """Counts over the marks of some lines; `share` turns one table into proportions."""

    marks: int
    operations: Counter[int]  # operations per mark: the length of the chain
    operators: Counter[str]  # over all operations
    shapes: Counter[str]  # the expression with n for each operand
    pairs: dict[str, Counter[str]]  # shape of one operation → patterns of its two operands
    operands: dict[str, Counter[str]]  # in longer chains: operator before the operand (^ first, n alone) → pattern
    digits: Counter[int]  # digits of the whole part, over all operands
    decimals: Counter[int]  # decimal places, over all operands
    answer_decimals: Counter[int]
    single_digit: Counter[str]
    leading_digit: Counter[str]  # of whole operands with two digits or more
    last_decimal: Counter[str]
    fractional_answers: dict[str, Counter[bool]]  # products and quotients: is the answer not whole
    marks_per_line: Counter[int]


def share(counts: Mapping) -> dict:
    """Counts as proportions of their sum."""
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}


def measure(lines: Iterable[str]) -> Proportions:
    """The proportions of the verified marks in GSM8K-schema lines: what the tables below were taken with."""
    out = Proportions(0, *(Counter() for _ in range(3)), {}, {}, *(Counter() for _ in range(6)), {}, Counter())
    marks = 0
    for row in _verified_rows(lines, out.marks_per_line):
        marks += 1
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
            for role, form in zip(_roles(shape), patterns):
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
        kind = _fraction_kind(shape, numbers)
        if kind is not None:
            out.fractional_answers.setdefault(kind, Counter())["." in answer] += 1
    return Proportions(**{**vars(out), "marks": marks})


def _verified_rows(lines: Iterable[str], marks_per_line: Counter[int]) -> Iterator[Row]:
    for line in lines:
        rows = parse_line(line)
        marks_per_line[len(rows)] += 1
        yield from (canonical(row) for row in rows if verify(row) is None)


# Taken by `measure` from the 23,716 marks in GSM8K's train.jsonl (7,473 lines, 7,378 with a mark), canonically spelled.
# The first five state what a reader asks about; the generator draws from the others: shapes of at least 0.05%, pairs
# of at least 0.4% (the others' operands independently), operands of at least 0.4%, each table scaled to 1. Inside a
# pattern digits are independent. Operands are drawn again until the answer is one GSM8K would have: not negative (7 of
# 23,716 are), at most two decimals, and a fraction only as often as FRACTIONAL_ANSWERS says.
OPERATIONS = {0: 0.0151, 1: 0.8503, 2: 0.1147, 3: 0.0153, 4: 0.0032, 5: 0.0011}  # per mark
OPERATORS = {"*": 0.3735, "+": 0.2911, "/": 0.1718, "-": 0.1636}  # over all operations
DIGITS = {1: 0.4213, 2: 0.3911, 3: 0.1385, 4: 0.0360, 5: 0.0096}  # of an operand's whole part
DECIMALS = {0: 0.9613, 1: 0.0279, 2: 0.0107}  # places of an operand
ANSWER_DECIMALS = {0: 0.9825, 1: 0.0140, 2: 0.0032}

FRACTIONAL_ANSWERS = {"whole operands": 0.0304, "decimal operands": 0.1063}
MARKS_PER_LINE = {1: 5, 2: 29, 3: 29, 4: 19, 5: 11, 6: 4, 7: 2, 8: 1}  # of 100 lines; lines without a mark left out
SHAPES = {  # of an expression; 99.4% of the marks
    "n*n": 0.3543,
    "n+n": 0.1852,
    "n-n": 0.1645,
    "n/n": 0.1457,
    "n+n+n": 0.0439,
    "n/n*n": 0.0245,
    "n*n/n": 0.0169,
    "n": 0.0150,
    "n+n+n+n": 0.0118,
    "n*n*n": 0.0093,
    "n-n-n": 0.0071,
    "n*(n/n)": 0.0031,
    "n+n+n+n+n": 0.0027,
    "(n/n)*n": 0.0016,
    "n*n+n": 0.0015,
    "n-n-n-n": 0.0011,
    "n+n*n": 0.0011,
    "n/(n/n)": 0.0010,
    "n*n-n": 0.0009,
    "n*n+n*n": 0.0008,
    "n+n+n+n+n+n": 0.0007,
    "n-n+n": 0.0007,
    "n+n-n": 0.0007,
}
PAIRS = {  # shape → patterns of its two operands
    "n*n": {  # of 8,403
        "d d": 0.2709,
        "dd d": 0.1065,
        "other": 0.1051,
        "d0 d": 0.0996,
        "d d0": 0.0808,
        "d dd": 0.0788,
        "d0 d0": 0.0265,
        "d00 d": 0.0199,
        "dd d0": 0.0189,
        "d0 0.d": 0.0180,
        "d d00": 0.0170,
        "d0 dd": 0.0170,
        "dd0 d": 0.0157,
        "dd dd": 0.0126,
        "ddd d": 0.0108,
        "d d.d": 0.0107,
        "d.d d": 0.0099,
        "d dd0": 0.0095,
        "d00 0.d": 0.0092,
        "dd 0.d": 0.0073,
        "d 0.d": 0.0070,
        "dd0 0.d": 0.0065,
        "d d000": 0.0058,
        "d0 d.d": 0.0049,
        "d ddd": 0.0048,
        "d0 0.dd": 0.0048,
        "d0 d00": 0.0046,
        "d000 d": 0.0045,
        "d00 0.dd": 0.0043,
        "dd00 d": 0.0040,
        "d000 0.d": 0.0040,
    },
    "n+n": {  # of 4,392
        "d d": 0.1833,
        "dd dd": 0.1163,
        "dd d": 0.1077,
        "d0 d0": 0.0913,
        "other": 0.0806,
        "d0 dd": 0.0562,
        "d0 d": 0.0551,
        "dd d0": 0.0483,
        "d dd": 0.0314,
        "d00 d00": 0.0253,
        "dd0 dd0": 0.0237,
        "dd0 d0": 0.0230,
        "d00 d0": 0.0205,
        "d d0": 0.0187,
        "dd0 dd": 0.0130,
        "d00 dd0": 0.0109,
        "ddd dd": 0.0105,
        "dd0 d00": 0.0096,
        "ddd ddd": 0.0093,
        "d0 dd0": 0.0093,
        "dd00 d00": 0.0073,
        "dd ddd": 0.0057,
        "dd00 dd00": 0.0057,
        "ddd d0": 0.0055,
        "d00 dd": 0.0052,
        "d000 d000": 0.0050,
        "d0 d00": 0.0048,
        "dd00 dd0": 0.0043,
        "ddd dd0": 0.0043,
        "d000 d00": 0.0041,
        "dd0 ddd": 0.0041,
    },
    "n-n": {  # of 3,901
        "dd d": 0.1497,
        "dd dd": 0.1110,
        "other": 0.0900,
        "d d": 0.0828,
        "d0 d": 0.0825,
        "d0 dd": 0.0807,
        "d0 d0": 0.0564,
        "d00 d0": 0.0438,
        "dd d0": 0.0405,
        "dd0 d0": 0.0295,
        "d00 dd0": 0.0285,
        "dd0 dd": 0.0218,
        "d00 dd": 0.0203,
        "dd0 dd0": 0.0200,
        "d00 d00": 0.0187,
        "ddd dd": 0.0185,
        "ddd ddd": 0.0164,
        "dd0 ddd": 0.0159,
        "d000 d00": 0.0126,
        "dd0 d00": 0.0097,
        "d00 ddd": 0.0087,
        "dd00 dd00": 0.0077,
        "d000 dd00": 0.0074,
        "ddd d0": 0.0069,
        "dd00 d00": 0.0059,
        "ddd dd0": 0.0051,
        "d000 d000": 0.0046,
        "ddd d00": 0.0044,
    },
    "n/n": {  # of 3,456
        "dd d": 0.2564,
        "d0 d": 0.1811,
        "other": 0.1033,
        "d d": 0.0680,
        "dd0 d": 0.0561,
        "dd0 d0": 0.0469,
        "d00 d": 0.0460,
        "d0 d0": 0.0362,
        "ddd d": 0.0327,
        "dd dd": 0.0249,
        "d00 d0": 0.0237,
        "dd0 dd": 0.0171,
        "ddd dd": 0.0171,
        "dd00 d": 0.0156,
        "d0 dd": 0.0110,
        "d000 d": 0.0101,
        "dd00 d0": 0.0075,
        "d00 d00": 0.0067,
        "d000 d0": 0.0058,
        "dd d0": 0.0055,
        "dd00 d00": 0.0052,
        "dd d.d": 0.0052,
        "d00 dd": 0.0049,
        "d000 d00": 0.0046,
        "ddd0 d": 0.0043,
        "d0 0.d": 0.0041,
    },
}
OTHER = {  # both operands of the rarer pairs; 97.8% of 3,890
    "d": 0.0972,
    "dd": 0.0856,
    "d0": 0.0763,
    "dd0": 0.0733,
    "d.d": 0.0728,
    "d00": 0.0704,
    "d000": 0.0648,
    "0.d": 0.0527,
    "dd00": 0.0527,
    "ddd0": 0.0455,
    "d0000": 0.0452,
    "ddd": 0.0450,
    "0.dd": 0.0424,
    "dd000": 0.0391,
    "dddd": 0.0326,
    "d.dd": 0.0177,
    "dd.d": 0.0165,
    "ddd00": 0.0136,
    "dd0000": 0.0118,
    "d00000": 0.0113,
    "ddd000": 0.0064,
    "dddd0": 0.0051,
}
OPERANDS = {  # in all other shapes: the operator before the operand (^: first, n: alone) → pattern
    "^": {  # 98.2% of 3,200
        "d": 0.3350,
        "d0": 0.2350,
        "dd": 0.2053,
        "d00": 0.0656,
        "dd0": 0.0638,
        "ddd": 0.0219,
        "d000": 0.0187,
        "dd00": 0.0159,
        "d.d": 0.0081,
        "d0000": 0.0047,
        "ddd0": 0.0041,
        "dd000": 0.0041,
    },
    "+": {  # 98.0% of 3,519
        "d": 0.3407,
        "dd": 0.2771,
        "d0": 0.1895,
        "d00": 0.0455,
        "dd0": 0.0449,
        "ddd": 0.0281,
        "d.d": 0.0205,
        "d000": 0.0111,
        "0.d": 0.0071,
        "dd00": 0.0071,
        "dd000": 0.0045,
        "ddd0": 0.0043,
    },
    "-": {  # 98.0% of 563
        "d": 0.3694,
        "dd": 0.2398,
        "d0": 0.2202,
        "d00": 0.0586,
        "dd0": 0.0337,
        "d000": 0.0160,
        "dd00": 0.0142,
        "ddd": 0.0124,
        "d.d": 0.0089,
        "dd000": 0.0071,
    },
    "*": {  # 98.8% of 1,755
        "d": 0.3288,
        "d0": 0.2422,
        "dd": 0.1151,
        "0.dd": 0.0986,
        "d00": 0.0872,
        "dd0": 0.0501,
        "d000": 0.0308,
        "dd00": 0.0131,
        "ddd": 0.0120,
        "d0000": 0.0057,
        "ddd0": 0.0046,
    },
    "/": {  # 99.8% of 1,215
        "d": 0.6305,
        "d00": 0.3012,
        "d0": 0.0379,
        "dd": 0.0280,
    },
    "n": {  # 99.2% of 355
        "dd": 0.3070,
        "d": 0.2620,
        "d0": 0.1859,
        "ddd": 0.0479,
        "d00": 0.0451,
        "dd0": 0.0451,
        "dddd": 0.0197,
        "d.d": 0.0197,
        "dd00": 0.0169,
        "d000": 0.0141,
        "dd.d": 0.0085,
        "ddd0": 0.0085,
        "dd000": 0.0056,
        "d0000": 0.0056,
    },
}
SINGLE_DIGIT = {
    "2": 0.2620,
    "3": 0.1718,
    "4": 0.1360,
    "5": 0.1280,
    "6": 0.0882,
    "8": 0.0737,
    "1": 0.0625,
    "7": 0.0473,
    "9": 0.0305,
}
LEADING_DIGIT = {
    "1": 0.3851,
    "2": 0.1962,
    "3": 0.1167,
    "4": 0.0900,
    "6": 0.0654,
    "5": 0.0633,
    "8": 0.0323,
    "7": 0.0275,
    "9": 0.0235,
}
LAST_DECIMAL = {
    "5": 0.6053,
    "1": 0.1426,
    "2": 0.0873,
    "8": 0.0477,
    "4": 0.0426,
    "6": 0.0294,
    "3": 0.0218,
    "9": 0.0132,
    "7": 0.0101,
}


_SHAPES = _Table(SHAPES)
_OTHER = _Table(OTHER)
_PAIRS = {shape: _Table(table) for shape, table in PAIRS.items()}
_OPERANDS = {role: _Table(table) for role, table in OPERANDS.items()}
_SINGLE_DIGIT, _LEADING_DIGIT, _LAST_DECIMAL = map(_Table, (SINGLE_DIGIT, LEADING_DIGIT, LAST_DECIMAL))


def _line_starts() -> list[int]:
    """First row of each line of a cycle, then the rows of a whole cycle; short and long lines well mixed."""
    counts = [count for count, lines in MARKS_PER_LINE.items() for _ in range(lines)]
    mixed = [counts[place * 37 % len(counts)] for place in range(len(counts))]  # 37 is coprime to 100
    return list(accumulate(mixed, initial=0))


_LINE_STARTS = _line_starts()
