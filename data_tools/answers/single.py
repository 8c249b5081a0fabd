"""Answers without parts that are answers themselves: numbers, letters, times, words, formulas, equations of
formulas."""

import re
from fractions import Fraction
from typing import Any

from data_tools.answers import symbols
from data_tools.answers.kinds import Formula, Group, Letter, Measure, Number, Relation, Several, Unclear, Words
from data_tools.answers.numbers import number
from data_tools.answers.units import CURRENCIES, unit_of

_BASED = re.compile(
    r"(?:⟦? ?|\( ?)?([0-9A-Fa-f]+)(?: ?\)| ?⟧)?_ ?\{? ?⟦? ?"
    r"(\d+|two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen) ?⟧? ?\}?"
)
_BASES = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)
_CLOCK = re.compile(r"(\d+) ?: ?(\d+)(?: ?: ?(\d+))?(.*)")
_DATE = re.compile(
    r"[12]\d{3} ?- ?[01]\d ?- ?[0-3]\d|[0-3]?\d ?- ?[0-3]?\d ?- ?[12]\d{3}"
)  # no difference of three numbers
_WORDY = re.compile(r"[^\W\d_]{2,}")
_PLAIN_TEXT = re.compile(r"[\w\s'\".,;:!?&()/-]+")
_FUNCTION_WORDS = frozenset(symbols.FUNCTIONS) | symbols.PLAIN_NAMES.keys()


def labelled(text: str) -> Any | None:
    """Read what its spelling alone tells: a number, a letter, a number in a base, a time of day, a date, a known
    set."""
    for kind in (_measured_number, _letter, _based, _clock, _date, _known_set):
        value = kind(text)
        if value is not None:
            return value
    return None


def _measured_number(text: str) -> Number | Measure | None:
    reading = number(text)
    if reading is None:
        return None
    value = Number(reading.value, reading.places)
    return Measure(value, reading.percent, reading.unit) if reading.percent or reading.unit else value


def _letter(text: str) -> Letter | None:
    """Read one letter, in brackets or \\text{} the label of a choice."""
    match = re.fullmatch(r"(\( ?)?(⟦)? ?(\()? ?([a-zA-Z]) ?(\))? ?(⟧)?( ?\))?\.?", text)
    if match is None or bool(match[1]) != bool(match[7]) or bool(match[3]) != bool(match[5]):
        return None
    is_enclosed = bool(match[1] or match[2] or match[3])
    return Letter(match[4], is_enclosed) if is_enclosed or match[4] not in "ei" else None


def _based(text: str) -> Number | Words | None:
    """Read a number with its base, such as 101_2."""
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    base = _BASES.get(match[2]) or int(match[2])
    if not (2 <= base <= 36 and all(int(digit, 36) < base for digit in match[1])):
        return None
    digits = match[1].lstrip("0").upper() or "0"
    return Number(Fraction(int(digits))) if base == 10 else Words(f"{digits} in base {base}")


def _clock(text: str) -> Measure | None:
    """Read a time of day or a ratio, also one that is text as a whole. Raise Unclear for one with anything else behind
    it."""
    enclosed = re.fullmatch("⟦([^⟦⟧]*)⟧", text)
    match = _CLOCK.fullmatch(enclosed[1].strip() if enclosed else text)
    if match is None:
        return None
    unit = unit_of(match[4]) if match[4].strip() else None
    if match[4].strip() and (unit is None or unit[0] != "half of the day"):
        raise Unclear("a time and more")
    hours, *others = [part for part in match.group(1, 2, 3) if part]
    return Measure(Words(":".join([str(int(hours)), *others])), unit=unit)


def _date(text: str) -> Words | None:
    return Words(text.replace(" ", "")) if _DATE.fullmatch(text) else None


def _known_set(text: str) -> Group | Several | None:
    """Read the sign of all real numbers, or of nothing."""
    if re.fullmatch(r"\\mathbb ?\{? ?R ?\}?", text):
        return Group("()", (formula(r"-\infty"), formula(r"\infty")))
    return Several((), True) if text in (r"\emptyset", "⦃⦄", "⦃ ⦄") else None


def words(text: str) -> Words | None:
    """Read words: letters in a row are a word and no product, for BDAC is not ABCD."""
    plain = re.sub(r"\s+", " ", re.sub("[⟦⟧\"']", "", text)).strip(" .,;:")
    parts = _WORDY.findall(plain)
    if not parts or not _PLAIN_TEXT.fullmatch(plain) or parts[0] in _FUNCTION_WORDS:
        return None
    first = re.match(r"[^\W\d_]+", plain)
    if not first and "⟦" not in text:
        return None
    if first and len(first[0]) == 1 and not any(len(word) > 1 for word in parts[:1]):
        return None
    return Words(plain.casefold())


def formula(text: str) -> Any:
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
    number_or_formula = of_expression(expression)
    if unit or percent:
        if not isinstance(number_or_formula, (Number, Formula)):
            raise Unclear("the unit of what is no number")
        return Measure(number_or_formula, percent, unit)
    return number_or_formula


def of_expression(expression: Any) -> Any:
    """Return the number that an expression is, else the formula."""
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


def relation(text: str) -> Relation:
    """Return an equation or inequality, as math-verify reads it."""
    expression = symbols.parsed(text)
    if expression is None:
        raise Unclear("no equation")
    value = of_expression(expression)
    if not isinstance(value, Relation):
        raise Unclear("no equation")
    return value


def _relation_mark(expression: Any) -> str | None:
    """Return the same for equations that differ by a factor. None where they are no polynomials."""
    import sympy

    try:
        difference = expression.lhs - expression.rhs
        polynomial = sympy.Poly(sympy.nsimplify(sympy.expand(difference), rational=True))
        names = sorted(polynomial.gens, key=str)
        monic = sympy.Poly(polynomial.as_expr(), *names).monic().as_expr()
        return f"{type(expression).__name__}: {monic}" if isinstance(expression, sympy.Eq) else None
    except Exception:  # sympy has no polynomial of it
        return None
