"""What an answer says: a number, a measure, a formula, words, a list, a set, a tuple or interval, a matrix, an equation.

read(r"x \\in [1,2)")    →  Named("x", Group("[)", (Number(1), Number(2))))
read(r"5\\text{ cm}")    →  Measure(Number(5), unit=("length", 1/100))
read("1 2")             →  None: nothing is guessed
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from data_tools.answers import symbols
from data_tools.answers.numbers import number
from data_tools.answers.spelling import ROW, spelled
from data_tools.answers.units import CURRENCIES, unit_of

LONGEST = 2000  # characters of an answer
_DEEPEST = 12  # of lists in lists


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
    value: "Number | Formula"
    percent: bool = False
    unit: tuple | None = None  # (what is measured, size or name)


@dataclass(frozen=True)
class Letter:
    text: str
    label: bool  # of a choice, (B) or \text{B}; a variable otherwise


@dataclass(frozen=True)
class Words:
    """Words, a time of day, a number with its base: equal where they are written alike."""

    text: str


@dataclass(frozen=True)
class Named:
    name: str
    value: Any


@dataclass(frozen=True)
class Group:
    """A tuple (), an open or closed interval, a row []: `brackets` tells. (1,2) is a point or an interval."""

    brackets: str
    items: tuple


@dataclass(frozen=True)
class Several:
    """Values in no order; of a set each one once. `union`: of intervals."""

    items: tuple
    distinct: bool = False
    union: bool = False


@dataclass(frozen=True)
class Matrix:
    rows: tuple


@dataclass(frozen=True)
class Relation:
    """An equation or inequality between formulas."""

    expression: Any
    mark: str | None


class Unclear(ValueError):
    """What an answer says is not certain."""


_NAME = (
    r"(?:m ?)?\\angle ?[A-Z]+|\\[a-z]+(?:_\{?\w+\}?)?|\|?[A-Z]{2,4}\|?|"
    r"[a-zA-Z](?:'|_\{? ?\w+ ?\}?)?(?:\^ ?\{-1\})?(?: ?\( ?-?\w+(?:, ?-?\w+)* ?\))?|⟦[^⟧]+⟧"
)
_IS_NAME = re.compile(_NAME)
_NO_NAMES = frozenset((r"\pi", r"\infty", r"\emptyset", "e", "i"))
_IN = re.compile(rf"({_NAME}) ?\\in (.*)")
_ORDER = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|<|>")
_BASED = re.compile(
    r"(?:⟦? ?|\( ?)?([0-9A-Fa-f]+)(?: ?\)| ?⟧)?_ ?\{? ?⟦? ?(\d+|two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen) ?⟧? ?\}?"
)
_BASES = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)
_CLOCK = re.compile(r"(\d+) ?: ?(\d+)(?: ?: ?(\d+))?(.*)")
_DATE = re.compile(
    r"[12]\d{3} ?- ?[01]\d ?- ?[0-3]\d|[0-3]?\d ?- ?[0-3]?\d ?- ?[12]\d{3}"
)  # no difference of three numbers
_WORDY = re.compile(r"[^\W\d_]{2,}")
_PLAIN_TEXT = re.compile(r"[\w\s'\".,;:!?&()/-]+")
_MATRIX = re.compile(
    r"[(\[]? ?\\begin ?\{(p|b|small|)(matrix|array)\}(?:\{[clr| ]*\})?(.*?)\\end ?\{\1\2\} ?[)\]]?", re.DOTALL
)
_CONNECTIVE = re.compile(r"⟦? ?,? ?\b(?:and|or)\b ?⟧?")
_FUNCTION_WORDS = frozenset(symbols._FUNCTIONS) | symbols._PLAIN_NAMES.keys()
_LEADS = re.compile(r"^(?:\\approx|\\sim|\\therefore|\\implies|\\Rightarrow|=|⟦ ?(?:approximately|about|exactly) ?⟧|"
                    r"(?:approximately|about|exactly)(?= ?\d)) ?")  # fmt: skip
_OPEN, _CLOSE = "([{⦃⟨⟦", ")]}⦄⟩⟧"


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Any | None:
    """What an answer says, None where that is not understood or not certain."""
    if len(text) > LONGEST:
        return None
    try:
        return _read(spelled(text), 0)
    except (ValueError, RecursionError, ArithmeticError):
        return None


def _read(text: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise Unclear("lists in lists")
    text = _inside(_LEADS.sub("", text.strip(f" {ROW}"), count=1))
    if not text:
        raise Unclear("nothing")
    for kind in (_measured_number, _french, _labelled, _several, _grouped, _matrix, _related, _text):
        found = kind(text, depth)
        if found is not None:
            return found
    return _formula(text)


def _inside(text: str) -> str:
    """Without braces around the whole, and a last comma or point."""
    text = text.strip().rstrip(",;").strip()
    if text.endswith(".") and not text.lower().endswith(".m."):
        text = text[:-1].strip()
    if text[:1] == "⟦" and _closing(text) == len(text) - 1 and not re.search("[A-Za-z]", text):
        text = text[1:-1].strip()
    while text[:1] == "{" and _closing(text) == len(text) - 1:
        text = text[1:-1].strip()
    return text


# -- leaves -----------------------------------------------------------------------------------------------------------


def _measured_number(text: str, depth: int) -> Any:
    found = number(text)
    if found is None:
        return None
    value = Number(found.value, found.places)
    return Measure(value, found.percent, found.unit) if found.percent or found.unit else value


def _labelled(text: str, depth: int) -> Any:
    """A letter; a number in a base; a time of day or a ratio; all reals; nothing."""
    if match := re.fullmatch(r"(\( ?)?(⟦)? ?(\()? ?([a-zA-Z]) ?(\))? ?(⟧)?( ?\))?\.?", text):
        enclosed = bool(match[1] or match[2] or match[3])
        if bool(match[1]) == bool(match[7]) and bool(match[3]) == bool(match[5]) and (enclosed or match[4] not in "ei"):
            return Letter(match[4], enclosed)
    if match := _BASED.fullmatch(text):
        base = _BASES.get(match[2]) or int(match[2])
        if 2 <= base <= 36 and all(int(digit, 36) < base for digit in match[1]):
            digits = match[1].lstrip("0").upper() or "0"
            return Number(Fraction(int(digits))) if base == 10 else Words(f"{digits} in base {base}")
    if match := _CLOCK.fullmatch(text):
        unit = unit_of(match[4]) if match[4].strip() else None
        if match[4].strip() and (unit is None or unit[0] != "half of the day"):
            raise Unclear("a time and more")
        return Measure(Words(":".join(str(int(part)) if not n else part for n, part in enumerate(match.group(1, 2, 3)) if part)),
                       unit=unit)  # fmt: skip
    if _DATE.fullmatch(text):
        return Words(text.replace(" ", ""))
    if re.fullmatch(r"\\mathbb ?\{? ?R ?\}?", text):
        infinite = _formula(r"\infty")
        return Group("()", (_formula(r"-\infty"), infinite))
    if text in (r"\emptyset", "⦃⦄", "⦃ ⦄"):
        return Several((), True)
    return None


def _text(text: str, depth: int) -> Any:
    """Words: letters in a row are a word and no product, for BDAC is not ABCD."""
    plain = re.sub(r"\s+", " ", re.sub("[⟦⟧\"']", "", text)).strip(" .,;:")
    found = _WORDY.findall(plain)
    if not found or not _PLAIN_TEXT.fullmatch(plain) or found[0] in _FUNCTION_WORDS:
        return None
    first = re.match(r"[^\W\d_]+", plain)
    if not first and "⟦" not in text:
        return None
    if first and len(first[0]) == 1 and not any(len(word) > 1 for word in found[:1]):
        return None
    return Words(plain.casefold())


def _formula(text: str) -> Any:
    value, unit, percent = text, None, False
    if match := re.fullmatch(rf"([-+]?) ?⟦? ?([{CURRENCIES}]) ?⟧? ?(.+)", value):
        unit, value = unit_of(match[2]), match[1] + match[3]
    elif match := re.fullmatch(r"(.*\S) ?%", value):
        percent, value = True, match[1]
    elif match := re.fullmatch(
        r"(.*[^\s^_({\[]) ?(⟦[^⟧]+⟧(?: ?\^ ?\{? ?\d ?\}?)?|\^\{\\circ\}(?: ?⟦? ?[CF] ?⟧?)?)", value
    ):
        unit, value = unit_of(match[2]), match[1]
        if unit is None:
            raise Unclear("a formula with words")
    elif match := re.fullmatch(r"(.*[\w})\]]) ([a-z]{2,}(?: ?\^ ?\{? ?\d ?\}?)?)", value):
        if (known := unit_of(match[2])) and not known[0].isspace() and match[2].rstrip("s") not in known[0]:
            unit, value = known, match[1]
    expression = symbols.parsed(value)
    if expression is None:
        raise Unclear("no formula")
    found = of_expression(expression)
    if unit or percent:
        if not isinstance(found, (Number, Formula)):
            raise Unclear("the unit of what is no number")
        return Measure(found, percent, unit)
    return found


def of_expression(expression: Any) -> Any:
    """The number that an expression is, else the formula."""
    import sympy

    if isinstance(expression, sympy.MatrixBase) or isinstance(expression, (sympy.Set, sympy.Tuple)):
        raise Unclear("not read here")
    if isinstance(expression, (sympy.core.relational.Relational, sympy.And, sympy.Or)):
        return Relation(expression, _relation_mark(expression))
    try:
        mark = symbols.fingerprint(expression)
    except Exception:  # whatever sympy makes of it: it has no value
        return Formula(expression, None)
    return Number(mark) if isinstance(mark, Fraction) else Formula(expression, mark)


# -- several ----------------------------------------------------------------------------------------------------------


def _closing(text: str) -> int | None:
    """The place of the bracket that closes the one at 0."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return place
    return None


def _split(text: str, separator: re.Pattern) -> list[str]:
    """The parts between separators that stand in no brackets. Unclear where brackets do not pair."""
    parts, depth, begin, place = [], 0, 0, 0
    while place < len(text):
        match = separator.match(text, place) if depth == 0 else None
        if match and match.end() > place:
            parts.append(text[begin:place])
            begin = place = match.end()
            continue
        depth += (text[place] in _OPEN) - (text[place] in _CLOSE)
        if depth < 0:
            raise Unclear("brackets that do not pair")
        place += 1
    if depth:
        raise Unclear("brackets that do not pair")
    return [*parts, text[begin:]]


_COMMA, _CUP, _EQUALS = re.compile(r"[,;]"), re.compile(r"\\cup(?![a-z])"), re.compile(r"(?<![<>!\\])=")


def _several(text: str, depth: int) -> Any:
    """Lists without brackets, unions, and what ± stands for."""
    parts = _split(text, _CUP)
    if len(parts) > 1:
        return _union([_read(part, depth + 1) for part in parts])
    parts = [part for piece in _split(text, _COMMA) for part in _split(piece, _CONNECTIVE)]
    parts = [part.strip() for part in parts if part.strip()]
    if len(parts) > 1:
        if re.search(r"\\ldots", text):
            raise Unclear("a list that goes on")
        if _is_sentence(text):
            return None
        items = [_read(part, depth + 1) for part in parts]
        if all(isinstance(one, Named) and isinstance(one.value, Group) for one in items) and re.search(r"\bor\b", text):
            return Named(items[0].name, _union([one.value for one in items]))
        if len(marks := {_mark(one) for one in items}) == 1 and None not in marks and not _COMMA.search(text):
            return items[-1]  # 3 1/2 or 7/2
        return _together(items)
    if (
        text.count(r"\pm") == 1
        and r"\mp" not in text
        and not re.match(rf"(?:{_NAME}) ?=", text)
        and not _grouped_whole(text)
    ):
        return _together([_read(text.replace(r"\pm", sign), depth + 1) for sign in "+-"])
    return None


def _is_sentence(text: str) -> bool:
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+", "", text))
    return len(words) > 6


def _together(items: list, distinct: bool = False) -> Several:
    """A list whose names say nothing where they are all the same: x=4 or x=5."""
    flat = list(_flat(items))
    names = {one.name for one in flat if isinstance(one, Named)}
    if len(names) == 1:
        flat = [one.value if isinstance(one, Named) else one for one in flat]
    return Several(tuple(flat), distinct)


def _flat(items: list) -> Iterator[Any]:
    for one in items:
        if isinstance(one, Several) and not one.distinct and not one.union:
            yield from one.items
        elif isinstance(one, Named) and isinstance(one.value, Several):
            yield from (Named(one.name, value) for value in one.value.items)
        else:
            yield one


def _union(items: list) -> Any:
    values = [one.value if isinstance(one, Named) else one for one in items]
    if not all(isinstance(one, Group) and len(one.items) == 2 or isinstance(one, Several) for one in values):
        raise Unclear("a union of what is no interval")
    return Several(tuple(values), union=True)


def _french(text: str, depth: int) -> Any:
    """]0,1] and [1,\\infty[."""
    match = re.fullmatch(r"([\[\](])([^\[\]]+),([^\[\]]+)([\[\])])", text)
    if not match or (match[1] in "[(" and match[4] in "])"):
        return None
    low, high = _read(match[2], depth + 1), _read(match[3], depth + 1)
    return Group(("[" if match[1] == "[" else "(") + ("]" if match[4] == "]" else ")"), (low, high))


def _grouped_whole(text: str) -> bool:
    return text[:1] in ("(", "[", "⦃", "⟨") and _closing(text) == len(text) - 1


def _grouped(text: str, depth: int) -> Any:
    if not _grouped_whole(text):
        return None
    begin, end, inner = text[0], text[-1], text[1:-1]
    if begin == "⦃" and end == "⦄":
        if match := re.fullmatch(rf" ?({_NAME}) ?(?:\||\\mid(?![a-z])|:) ?(.+)", inner):
            return _read(match[2], depth + 1)
        return _together([_read(part, depth + 1) for part in _split(inner, _COMMA) if part.strip()], True)
    parts = _split(inner, _COMMA)
    if len(parts) == 1:
        return _read(inner, depth + 1) if (begin, end) == ("(", ")") else None
    if begin == "⟨":
        begin, end = "(", ")"
    if end not in ")]":
        raise Unclear("brackets that do not pair")
    if begin + end in ("[)", "(]") and len(parts) != 2:
        raise Unclear("an interval between more than two ends")
    return Group(begin + end, tuple(_read(part, depth + 1) for part in parts))


def _matrix(text: str, depth: int) -> Any:
    match = _MATRIX.fullmatch(text)
    if not match:
        return None
    body = re.sub(r"\\hline", "", match[3]).strip(f" {ROW}")
    rows = tuple(
        tuple(_read(cell, depth + 1) for cell in _split(row, re.compile("&"))) for row in _split(body, re.compile(ROW))
    )
    if len({len(row) for row in rows}) != 1:
        raise Unclear("rows of several lengths")
    return rows[0][0] if len(rows) == len(rows[0]) == 1 else Matrix(rows)


# -- relations --------------------------------------------------------------------------------------------------------


def _related(text: str, depth: int) -> Any:
    if match := _IN.fullmatch(text):
        return Named(_plain_name(match[1]), _read(match[2], depth + 1))
    sides = [side.strip() for side in _split(text, _EQUALS)]
    if len(sides) > 1 and all(sides):
        return _equation(sides, text, depth)
    sides = [side.strip() for side in _split(text, _ORDER)]
    if len(sides) in (2, 3) and all(sides):
        return _inequality(sides, _ORDER.findall(text), text, depth)
    return None


def _equation(sides: list[str], text: str, depth: int) -> Any:
    if _is_name(sides[0]):
        return Named(_plain_name(sides[0]), _alike([_read(side, depth + 1) for side in sides[1:]]))
    if len(sides) == 2 and _is_name(sides[1]) and isinstance(value := _read(sides[0], depth + 1), (Number, Measure)):
        return Named(_plain_name(sides[1]), value)
    values = [_read(side, depth + 1) for side in sides]
    if all(isinstance(one, Number) or (isinstance(one, Formula) and not one.expression.free_symbols) for one in values):
        return _alike(values)
    if len(sides) != 2 or not all(isinstance(one, (Number, Formula, Letter)) for one in values):
        raise Unclear("a chain of equations")
    return relation(text)


def _alike(values: list) -> Any:
    """The last of values that are equal, such as of 2+2=4. Unclear where they are not: 2+2=5."""
    if len(values) > 1 and (len(marks := {_mark(one) for one in values}) > 1 or None in marks):
        raise Unclear("an equation that does not hold")
    return values[-1]


def _mark(value: Any) -> "Fraction | str | None":
    return value.value if isinstance(value, Number) else value.mark if isinstance(value, Formula) else None


def relation(text: str) -> Relation:
    """An equation or inequality, as math-verify reads it."""
    expression = symbols.parsed(text)
    if expression is None:
        raise Unclear("no equation")
    found = of_expression(expression)
    if not isinstance(found, Relation):
        raise Unclear("no equation")
    return found


def _relation_mark(expression: Any) -> str | None:
    """The same for equations that differ by a factor. None where they are no polynomials."""
    import sympy

    try:
        difference = expression.lhs - expression.rhs
        polynomial = sympy.Poly(sympy.nsimplify(sympy.expand(difference), rational=True))
        names = sorted(polynomial.gens, key=str)
        return f"{type(expression).__name__}: {sympy.Poly(polynomial.as_expr(), *names).monic().as_expr()}" if isinstance(
            expression, sympy.Eq) else None  # fmt: skip
    except Exception:  # sympy has no polynomial of it
        return None


def _inequality(sides: list[str], signs: list[str], text: str, depth: int) -> Any:
    places = [n for n, side in enumerate(sides) if _is_name(side)]
    if places not in ([1], [0]) or (len(sides) == 3 and places != [1]):
        return relation(text)
    name, infinite = _plain_name(sides[places[0]]), _formula(r"\infty")
    rising = [sign in ("<", r"\le") for sign in signs]
    if len(sides) == 3:
        if rising[0] != rising[1]:
            raise Unclear("two inequalities in two directions")
        ends = [_read(sides[0], depth + 1), _read(sides[2], depth + 1)]
        closed = [sign.startswith("\\") for sign in signs]
        if not rising[0]:
            ends, closed = ends[::-1], closed[::-1]
        return Named(name, Group(("[" if closed[0] else "(") + ("]" if closed[1] else ")"), tuple(ends)))
    end, closed = _read(sides[1 - places[0]], depth + 1), signs[0].startswith("\\")
    upper = rising[0] == (places[0] == 0)  # the name is below the end
    if upper:
        return Named(name, Group("(" + ("]" if closed else ")"), (_formula(r"-\infty"), end)))
    return Named(name, Group(("[" if closed else "(") + ")", (end, infinite)))


def _is_name(text: str) -> bool:
    return bool(_IS_NAME.fullmatch(text)) and text not in _NO_NAMES


def _plain_name(text: str) -> str:
    return re.sub(r"[⟦⟧{}\s|]", "", text)
