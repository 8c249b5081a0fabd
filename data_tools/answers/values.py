"""Read what an answer says: one of kinds.py, such as a number, a measure, a list, a set, an interval or an equation.

read(r"x \\in [1,2)")    →  Named("x", Group("[)", (Number(1), Number(2))))
read(r"5\\text{ cm}")    →  Measure(Number(5), unit=("length", 1/100))
read("1 2")             →  None: nothing is guessed
"""

import functools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from data_tools.answers.kinds import Formula, Group, Letter, Matrix, Measure, Named, Number, Several, Unclear
from data_tools.answers.single import formula, labelled, relation, words
from data_tools.answers.spelling import ROW, spelled

LONGEST = 2000  # characters of an answer
_DEEPEST = 12  # of lists in lists

_NAME = (
    r"(?:m ?)?\\angle ?[A-Z]+|\\[a-z]+(?:_\{?\w+\}?)?|\|?[A-Z]{2,4}\|?|"
    r"[a-zA-Z](?:'|_\{? ?\w+ ?\}?)?(?:\^ ?\{-1\})?(?: ?\( ?-?\w+(?:, ?-?\w+)* ?\))?|⟦[^⟧]+⟧"
)
_IS_NAME = re.compile(_NAME)
_NO_NAMES = frozenset((r"\pi", r"\infty", r"\emptyset", "e", "i"))
_IN = re.compile(rf"({_NAME}) ?\\in (.*)")
_ORDER = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|<|>")
_MATRIX = re.compile(
    r"[(\[]? ?\\begin ?\{(p|b|small|)(matrix|array)\}(?:\{[clr| ]*\})?(.*?)\\end ?\{\1\2\} ?[)\]]?", re.DOTALL
)
_CONNECTIVE = re.compile(r"⟦? ?,? ?\b(?:and|or)\b ?⟧?")
_LEADS = re.compile(r"^(?:\\approx|\\sim|\\therefore|\\implies|\\Rightarrow|=|⟦ ?(?:approximately|about|exactly) ?⟧|"
                    r"(?:approximately|about|exactly)(?= ?\d)) ?")  # fmt: skip
_OPEN, _CLOSE = "([{⦃⟨⟦", ")]}⦄⟩⟧"


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Any | None:
    """Return what an answer says, None where that is not understood or not certain."""
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
    value = labelled(text)
    for kind in (_french, _several, _grouped, _matrix, _related):
        if value is not None:
            return value
        value = kind(text, depth)
    if value is None:
        value = words(text)
    return formula(text) if value is None else value


def _inside(text: str) -> str:
    """Return the text without braces around the whole, and without a last comma or point."""
    text = text.strip().rstrip(",;").strip()
    if text.endswith(".") and not text.lower().endswith(".m."):
        text = text[:-1].strip()
    if text[:1] == "⟦" and _closing(text) == len(text) - 1 and not re.search("[A-Za-z]", text):
        text = text[1:-1].strip()
    while text[:1] == "{" and _closing(text) == len(text) - 1:
        text = text[1:-1].strip()
    return text


# -- several ----------------------------------------------------------------------------------------------------------


def _closing(text: str) -> int | None:
    """Return the place of the bracket that closes the one at 0."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return place
    return None


def _split(text: str, separator: re.Pattern) -> list[str]:
    """Return the parts between separators that stand in no brackets. Raise Unclear where brackets do not pair."""
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
    """Read lists without brackets, unions, and what ± stands for."""
    parts = _split(text, _CUP)
    if len(parts) > 1:
        return _union([_read(part, depth + 1) for part in parts])
    parts = [part for piece in _split(text, _COMMA) for part in _split(piece, _CONNECTIVE)]
    parts = [part.strip() for part in parts if part.strip()]
    if len(parts) > 1:
        return _listed(text, parts, depth)
    return _plus_minus(text, depth)


def _listed(text: str, parts: list[str], depth: int) -> Any:
    """Read a list of several parts; None where they are those of a sentence. Raise Unclear for a list that goes on."""
    if re.search(r"\\ldots", text):
        raise Unclear("a list that goes on")
    if _is_sentence(text):
        return None
    items = [_read(part, depth + 1) for part in parts]
    if all(isinstance(item, Named) and isinstance(item.value, Group) for item in items):
        if re.search(r"\bor\b", text):
            return Named(items[0].name, _union([item.value for item in items]))
    if len(marks := {_mark(item) for item in items}) == 1 and None not in marks and not _COMMA.search(text):
        return items[-1]  # 3 1/2 or 7/2
    return _together(items)


def _plus_minus(text: str, depth: int) -> Several | None:
    """Read both numbers that one ± stands for."""
    if text.count(r"\pm") != 1 or r"\mp" in text or re.match(rf"(?:{_NAME}) ?=", text) or _grouped_whole(text):
        return None
    return _together([_read(text.replace(r"\pm", sign), depth + 1) for sign in "+-"])


def _is_sentence(text: str) -> bool:
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+", "", text))
    return len(words) > 6


def _together(items: list, distinct: bool = False) -> Several:
    """Return a list whose names say nothing where they are all the same: x=4 or x=5."""
    flat = list(_flat(items))
    names = {item.name for item in flat if isinstance(item, Named)}
    if len(names) == 1:
        flat = [item.value if isinstance(item, Named) else item for item in flat]
    return Several(tuple(flat), distinct)


def _flat(items: list) -> Iterator[Any]:
    for item in items:
        if isinstance(item, Several) and not item.distinct and not item.union:
            yield from item.items
        elif isinstance(item, Named) and isinstance(item.value, Several):
            yield from (Named(item.name, value) for value in item.value.items)
        else:
            yield item


def _union(items: list) -> Any:
    values = [item.value if isinstance(item, Named) else item for item in items]
    if not all(isinstance(item, Group) and len(item.items) == 2 or isinstance(item, Several) for item in values):
        raise Unclear("a union of what is no interval")
    return Several(tuple(values), union=True)


def _french(text: str, depth: int) -> Any:
    """Read intervals such as ]0,1] and [1,\\infty[."""
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
    """Return the last of values that are equal, such as of 2+2=4. Raise Unclear where they are not: 2+2=5."""
    if len(values) > 1 and (len(marks := {_mark(value) for value in values}) > 1 or None in marks):
        raise Unclear("an equation that does not hold")
    return values[-1]


def _mark(value: Any) -> "Fraction | str | None":
    return value.value if isinstance(value, Number) else value.mark if isinstance(value, Formula) else None


def _inequality(sides: list[str], signs: list[str], text: str, depth: int) -> Any:
    places = [n for n, side in enumerate(sides) if _is_name(side)]
    if places not in ([1], [0]) or (len(sides) == 3 and places != [1]):
        return relation(text)
    name = _plain_name(sides[places[0]])
    rising = [sign in ("<", r"\le") for sign in signs]
    if len(sides) == 3:
        if rising[0] != rising[1]:
            raise Unclear("two inequalities in two directions")
        ends = [_read(sides[0], depth + 1), _read(sides[2], depth + 1)]
        closed = [sign.startswith("\\") for sign in signs]
        if not rising[0]:
            ends, closed = ends[::-1], closed[::-1]
        return Named(name, Group(("[" if closed[0] else "(") + ("]" if closed[1] else ")"), tuple(ends)))
    end, is_closed = _read(sides[1 - places[0]], depth + 1), signs[0].startswith("\\")
    is_below = rising[0] == (places[0] == 0)
    if is_below:
        return Named(name, Group("(" + ("]" if is_closed else ")"), (formula(r"-\infty"), end)))
    return Named(name, Group(("[" if is_closed else "(") + ")", (end, formula(r"\infty"))))


def _is_name(text: str) -> bool:
    return bool(_IS_NAME.fullmatch(text)) and text not in _NO_NAMES


def _plain_name(text: str) -> str:
    return re.sub(r"[⟦⟧{}\s|]", "", text)
