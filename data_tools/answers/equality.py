"""Whether two answers say the same, and one key for all answers that do.

    key(read("0.5"), like=gold) == key(read(r"\\frac12"), like=gold)

An answer is keyed in the form of the row's own answer, `like`: in its unit (5 m are 500 cm; a number without a unit is
in the unit that was asked for), as a share or in percent as it is, with or without the name of a variable. So equality
is one of classes: what has the verdict "right" has one key. The one exception are decimals that stand for a number that
has no last decimal (0.333333 for 1/3, to 6 places at least), which are right and keep their own key.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from data_tools.answers import symbols
from data_tools.answers.kinds import Formula, Group, Letter, Matrix, Measure, Named, Number, Relation, Several, Words
from data_tools.answers.units import Unit

_PLACES = 6  # decimals and digits, the least for an approximation


def is_same(gold: Any, answer: Any) -> bool:
    """Return whether an answer says what the row's own does."""
    if key(gold, gold) == key(answer, gold) or _is_near(gold, answer):
        return True
    return isinstance(gold, Formula) and _is_related(gold, answer)


def key(value: Any, like: Any) -> str:
    """Return one text for all answers that are equal as answers to a question whose own answer is `like`."""
    if value is not like and Relation in (type(value), type(like)) and _is_related(like, value):
        return key(like, like)
    if isinstance(value, Named):
        named = like.name if isinstance(like, Named) else None
        shown = f"{value.name} = " if named is not None and named != value.name else ""
        return shown + key(value.value, like.value if isinstance(like, Named) else like)
    if isinstance(like, Named):
        like = like.value
    return _KEYS[type(value)](value, like)


def _letter_key(value: Letter, like: Any) -> str:
    return value.text.upper() if isinstance(like, Letter) and like.label else value.text


def _relation_key(value: Relation, like: Any) -> str:
    return value.mark or f"{value.expression}"


# -- numbers, formulas and what they measure --------------------------------------------------------------------------


def _measure_key(value: Any, like: Any) -> str:
    measure = value if isinstance(value, Measure) else Measure(value)
    wanted = like if isinstance(like, Measure) else Measure(like)
    if isinstance(measure.value, Words):
        return _keyed(measure.value.text, _left(measure.unit, wanted.unit))
    amount = _amount(measure.value)
    if isinstance(amount, Fraction):
        amount = _share(_in_unit(amount, measure.unit, wanted.unit), measure, wanted)
        return _keyed(str(amount), _left(measure.unit, wanted.unit))
    percent = "%" if measure.percent else ""
    return _keyed(f"{amount}{percent}", _left(measure.unit, wanted.unit, changes=False))


def _amount(value: Any) -> "Fraction | str":
    if isinstance(value, Number):
        return value.value
    return value.mark if value.mark is not None else f"{value.expression}"


def _share(amount: Fraction, measure: Measure, wanted: Measure) -> Fraction:
    """Return percent and shares in the form that is wanted: a number above 1 can be no share, so it is in percent."""
    gold = wanted.value.value if isinstance(wanted.value, Number) else None
    if wanted.percent:
        return amount / 100 if measure.percent or abs(amount) > 1 else amount
    if measure.percent:
        return amount if gold is not None and abs(gold) > 1 and amount / 100 != gold else amount / 100
    return amount


def _in_unit(amount: Fraction, unit: Unit | None, wanted: Unit | None) -> Fraction:
    ratio = _ratio(unit, wanted) if unit and wanted and unit != wanted else None
    return amount if ratio is None else amount * ratio


def _ratio(unit: Unit, wanted: Unit) -> Fraction | None:
    """Return how many of the wanted unit a unit is; None where it cannot be changed into that."""
    (kind, size), (wanted_kind, wanted_size) = unit, wanted
    if kind == wanted_kind and isinstance(size, Fraction) and isinstance(wanted_size, Fraction):
        return size / wanted_size
    return None


def _left(unit: Unit | None, wanted: Unit | None, changes: bool = True) -> Unit | None:
    """Return the unit that is not the wanted one."""
    if unit is None or wanted is None or unit == wanted or (changes and _ratio(unit, wanted) is not None):
        return None
    return unit


def _keyed(text: str, unit: Unit | None) -> str:
    return f"{text} {unit[0]} {unit[1]}" if unit else text


def _is_near(gold: Any, answer: Any) -> bool:
    """Return whether one is a decimal number that the other, which has no last decimal, rounds to."""
    if isinstance(gold, Named) and isinstance(answer, Named) and gold.name != answer.name:
        return False
    gold, answer = (value.value if isinstance(value, Named) else value for value in (gold, answer))
    if isinstance(gold, (Group, Several)) and type(gold) is type(answer) and len(gold.items) == len(answer.items):
        if isinstance(gold, Group) and isinstance(answer, Group) and gold.brackets == answer.brackets:
            return all(is_same(g, a) for g, a in zip(gold.items, answer.items))
        return False
    wanted, given = (value if isinstance(value, Measure) else Measure(value) for value in (gold, answer))
    if _left(given.unit, wanted.unit, changes=False) or wanted.percent != given.percent:
        return False
    verdicts = (_rounds_to(wanted.value, given.value), _rounds_to(given.value, wanted.value))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def _rounds_to(exact: Any, decimal: Any) -> bool | None:
    """Return whether a number without a last decimal rounds to a decimal number; None where they are no such
    numbers."""
    if not isinstance(decimal, Number) or decimal.places is None or decimal.places < _PLACES:
        return None
    value = _endless(exact)
    if value is None or abs(decimal.value) * 10**decimal.places < 10 ** (_PLACES - 1):
        return None
    return abs(value - decimal.value) <= Fraction(1, 2 * 10**decimal.places)


def _endless(value: Any) -> Fraction | None:
    """Return a real number that no decimal number is equal to, to 20 digits; None for any other value."""
    if isinstance(value, Number):
        rest = value.value.denominator
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        return value.value if rest != 1 else None
    if isinstance(value, Formula) and value.mark is not None:
        try:
            return Fraction(value.mark)
        except ValueError:  # complex, or of variables
            return None
    return None


# -- several ----------------------------------------------------------------------------------------------------------


def _group_key(value: Group, like: Any) -> str:
    if isinstance(like, Several) and not like.union and len(like.items) == len(value.items):
        if value.brackets == "()" and not _may_be_interval(value):
            return _several_key(value.items, like, False)
    return _bracketed_key(value, like)


def _bracketed_key(value: Group, like: Any) -> str:
    alike = isinstance(like, Group) and len(like.items) == len(value.items)
    items = [key(item, like.items[n] if alike else item) for n, item in enumerate(value.items)]
    return f"{value.brackets[0]}{'; '.join(items)}{value.brackets[1]}"


def _matrix_key(value: Matrix, like: Any) -> str:
    alike = isinstance(like, Matrix) and [len(row) for row in like.rows] == [len(row) for row in value.rows]
    rows = [
        ", ".join(key(cell, like.rows[r][c] if alike else cell) for c, cell in enumerate(row))
        for r, row in enumerate(value.rows)
    ]
    return f"matrix [{'; '.join(rows)}]"


def _list_key(value: Several, like: Any) -> str:
    if value.union:
        return _union_key(value)
    if isinstance(like, Group) and like.brackets == "()" and len(like.items) == len(value.items) and not value.distinct:
        names = [item.name for item in value.items if isinstance(item, Named)]
        if not _may_be_interval(like) and names == sorted(names):  # a point without its brackets
            return _bracketed_key(Group("()", value.items), like)
    return _several_key(value.items, like, value.distinct)


def _several_key(items: tuple, like: Any, distinct: bool) -> str:
    asked = like.items[0] if isinstance(like, Several) and like.items else None
    keys = [
        f"{item.name} = {key(item.value, item.value)}" if isinstance(item, Named) else
        key(item, asked if _is_like(item, asked) else item) for item in items
    ]  # fmt: skip
    return f"{{{'; '.join(sorted(set(keys) if distinct or (isinstance(like, Several) and like.distinct) else keys))}}}"


def _is_like(one: Any, asked: Any) -> bool:
    """Return whether the first of a list says in what form the others are wanted: their unit."""
    return isinstance(one, Measure) and isinstance(asked, Measure) and not one.percent and not asked.percent


def _union_key(value: Several) -> str:
    return f"{' ∪ '.join(sorted(key(item, item) for item in value.items))}"


def _may_be_interval(group: Group) -> bool:
    if len(group.items) != 2:
        return False
    low, high = (item.value if isinstance(item, Number) else _endless(item) for item in group.items)
    return low is None or high is None or low < high


# -- equations --------------------------------------------------------------------------------------------------------


def _is_related(gold: Any, answer: Any) -> bool:
    """Return whether what has no fingerprint is equal to math-verify."""
    pair = [_expression(value) for value in (gold, answer)]
    if None in pair or not all(isinstance(value, (Relation, Named, Formula)) for value in (gold, answer)):
        return False
    if isinstance(gold, Relation) != isinstance(answer, Relation) and not all(
        isinstance(value, (Relation, Named)) for value in (gold, answer)
    ):
        return False
    if all(isinstance(value, Formula) and value.mark is not None for value in (gold, answer)):
        return False
    if all(isinstance(value, Named) for value in (gold, answer)):
        return False
    if all(isinstance(value, Relation) and value.mark is not None for value in (gold, answer)):
        return False
    return symbols.are_equal(*pair)


def _expression(value: Any) -> Any | None:
    if isinstance(value, (Relation, Formula)):
        return value.expression
    if isinstance(value, Named) and isinstance(value.value, (Number, Formula)):
        inner = value.value
        import sympy

        right = sympy.Rational(str(inner.value)) if isinstance(inner, Number) else inner.expression
        name = symbols.parsed(value.name)
        return sympy.Eq(name, right, evaluate=False) if name is not None else None
    return None


_KEYS: dict[type, Callable[[Any, Any], str]] = {
    Number: _measure_key,
    Measure: _measure_key,
    Formula: _measure_key,
    Letter: _letter_key,
    Words: lambda value, like: value.text,
    Group: _group_key,
    Several: _list_key,
    Matrix: _matrix_key,
    Relation: _relation_key,
}
