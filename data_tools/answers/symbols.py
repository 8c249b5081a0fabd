"""Formulas, as math-verify's parser reads them, told apart by their values: equal formulas have equal fingerprints.

A formula without variables has its value, to 20 digits; one with variables has its values at fixed points, two at least
(a formula of degree d that differs agrees there with chance 0, for the points are random). What cannot be evaluated,
such as an unknown function, goes by its structure.
"""

import functools
import hashlib
import logging
import re
from fractions import Fraction
from typing import Any

_DIGITS, _WORKING = 20, 45  # of a fingerprint; of the sums that lead to it
_LONGEST = 5000  # digits before the point that are compared; larger numbers are the same where they are written alike
_POINTS = 3
_LETTER = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z]+)")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
# which the parser leaves out without a word: the subscript of a number or of a bracket, 5_2, and a prime, f'(x)
_LEFT_OUT = re.compile(
    r"[\d)\]]\s*_|(?<![\^_])\{[\d.]+\}\s*_|\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}\s*_|'|\\prime(?![a-zA-Z])|\\[hv]?phantom"
    r"|\\[hv]space|!\s*!|≅"  # 5!! is not (5!)!
)
_WHOLES = r"\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"  # what a \frac of whole numbers divides
_MIXED = re.compile(rf"(?<![\w.^}}\])!])(\d+)\s*(?:\\frac{_WHOLES}|\{{\s*\\frac{_WHOLES}\s*\}})")  # 3\frac{1}{2}
_FACTOR = re.compile(r"\(|\{|\d|\\(?:frac|sqrt|binom)(?![a-zA-Z])")  # what a factor begins with
_ARGUMENTS = {"frac": 2, "binom": 2, "sqrt": 1}
FUNCTIONS = (
    "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp sqrt max min gcd lcm det lim arg deg dim"
).split()
PLAIN_NAMES = {"pi": r"\pi ", "infinity": r"\infty ", "inf": r"\infty ", "theta": r"\theta ", "alpha": r"\alpha ",
                "beta": r"\beta ",
                "gamma": r"\gamma ", "lambda": r"\lambda ", "phi": r"\phi ", "omega": r"\omega "}  # fmt: skip


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> Any | None:
    """Return the sympy expression of a formula in one spelling, None where it is none."""
    latex = _latex(text)
    if latex is None:
        return None
    import sympy

    try:
        expressions = _parser()(f"\\boxed{{{latex}}}")
    except Exception:  # a RecursionError, whatever sympy makes of odd input: the text is no formula
        return None
    return expressions[0] if expressions and isinstance(expressions[0], (sympy.Basic, sympy.MatrixBase)) else None


@functools.lru_cache(maxsize=1)
def _parser() -> Any:
    """Return math-verify's parser of LaTeX, without what it does to units: to it, `4t` is 4."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    for name in ("math_verify", "latex2sympy2_extended"):
        # it warns that its time limits are off, and of every failure
        logging.getLogger(name).setLevel(logging.CRITICAL)
    spelling = NormalizationConfig(units=False, malformed_operators=False, nits=False, boxed="last")
    wanted = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)]
    return lambda text: parse(text, wanted, fallback_mode="no_fallback", parsing_timeout=None)


def _latex(text: str) -> str | None:
    """Return LaTeX that the parser takes as it is meant; None for what it would misread."""
    text = re.sub(r"([\^_])\s*(-?\d+(?:\.\d+)?)", r"\1{\2}", text)  # 10^23 is nobody's 10^2 · 3
    if re.search(
        r"⟦[^⟧]{2,}⟧|[\d.][\s⟦⟧]+[\d.]|\\ldots|\\approx|[＄€£¥₹¢%#&?;@\"]|\\q?quad|⦃|⦄|⟨|⟩|\\\\|:|(?<!\d)\.(?!\d)", text
    ) or _LEFT_OUT.search(text):
        return None
    text = text.replace("⟦", "").replace("⟧", "").replace("**", "^").replace("^{\\circ}", "*(\\pi/180)")
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"(?<!\d)\.(\d)", r"0.\1", text)
    text = _LETTER.sub(_named, text)
    if text.count("\\sqrt(") or "\0" in text:
        text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
        if "\0" in text:
            return None
    product = _multiplied(text)
    return product if product is None else _cased(product.replace("*", r"\cdot "))


def _multiplied(text: str) -> str | None:
    """Return the formula with a sign between factors that stand side by side, for the parser adds numbers there: to it,
    2(3) is 5. None for a whole number before a fraction that is 1 or more, which is a product to some, a sum to others.
    """
    if any(int(over) >= int(under) for *_, over, under in map(_mixed_parts, _MIXED.finditer(text))):
        return None
    text = _MIXED.sub(lambda match: "({}+\\frac{{{}}}{{{}}})".format(*_mixed_parts(match)), text)
    parts, place = [], 0
    for match in _FACTOR.finditer(text):
        if _ends_factor(text[: match.start()], match[0]):
            parts += [text[place : match.start()], "*"]
            place = match.start()
    return "".join([*parts, text[place:]])


def _mixed_parts(match: re.Match) -> tuple[str, str, str]:
    """Return the whole number, what is divided, and by what, of a match of _MIXED."""
    return match[1], match[2] or match[4], match[3] or match[5]


def _ends_factor(before: str, following: str) -> bool:
    """Return whether `before` ends with a whole factor in digits, brackets or braces, and no argument or exponent."""
    text = before.rstrip()
    if text.endswith(")"):
        return True
    if re.search(r"(?:^|[^\w.}])[\d.]+$", text):
        return not following.isdigit()
    arguments = 0
    while text.endswith("}") and (begin := _opening(text)) is not None:
        text, arguments = text[:begin].rstrip(), arguments + 1
        if command := re.search(r"\\([a-zA-Z]+)(?:\[[^\[\]]*\])?$", text):
            return arguments == _ARGUMENTS.get(command[1])
    return arguments > 0 and not text.endswith(("_", "^"))


def _opening(text: str) -> int | None:
    """Return the place of the brace that the last one closes."""
    depth = 0
    for place in range(len(text) - 1, -1, -1):
        depth += (text[place] == "}") - (text[place] == "{")
        if depth == 0:
            return place
    return None


def _named(match: re.Match) -> str:
    """Return a word that is written without a backslash as a function or letters; a long word is no formula."""
    word = match[1]
    if word in PLAIN_NAMES:
        return PLAIN_NAMES[word]
    if word in FUNCTIONS:
        return f"\\{word}" if word == "sqrt" else f"\\{word} "
    return word if len(word) < 5 else "\0"


def _cased(text: str) -> str | None:
    """Return the formula with capital letters as variables of their own, which to the parser are the small ones."""

    def mapped(match: re.Match) -> str:
        return match[0] if match[1] is None else f"{match[1].lower()}_{{9}}"

    if re.search(r"[A-Z]_", _COMMAND.sub("", text)):
        return text
    return re.sub(r"\\[a-zA-Z]+(?:\s*\{[A-Z]\})?|([A-Z])(?!\()", mapped, text)


def fingerprint(expression: Any) -> "Fraction | str":
    """Return the same for equal expressions: the value of a rational number, else digits."""
    import sympy

    if isinstance(expression, sympy.Rational):
        return Fraction(int(expression.p), int(expression.q))
    expression = expression.replace(lambda e: isinstance(e, sympy.Float), lambda e: sympy.Rational(str(e)))
    imaginary = {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    if imaginary:
        expression = expression.xreplace(imaginary)
    names = sorted(expression.free_symbols, key=str)
    if not names:
        exact = expression.doit() if expression.is_rational and _is_small(expression) else None
        if isinstance(exact, sympy.Rational):
            return Fraction(int(exact.p), int(exact.q))
        return _digits(expression)
    values = []
    for point in range(_POINTS):
        values.append(_digits(expression.xreplace({name: _coordinate(name.name, point) for name in names})))
    if len(set(values)) == 1 and re.fullmatch(r"-?\d+", values[0]):
        return Fraction(values[0])  # sin^2 x + cos^2 x
    return f"at {_POINTS} points {' and '.join(values)}"


def _is_small(expression: Any) -> bool:
    """Return whether an expression can be evaluated exactly without long numbers."""
    import sympy

    sizes = [abs(number) for number in expression.atoms(sympy.Integer)]
    return (
        len(str(expression)) < 200
        and all(size < 10**9 for size in sizes)
        and not any(abs(power.exp) > 1000 for power in expression.atoms(sympy.Pow) if power.exp.is_number)
        and not any(f.args[0].is_number and f.args[0] > 1000 for f in expression.atoms(sympy.factorial))
    )


def _digits(expression: Any) -> str:
    """Return the value of an expression without variables. Raise ValueError where it has none."""
    import sympy

    value = sympy.N(expression, _WORKING, maxn=200, chop=False)
    if value in (sympy.oo, -sympy.oo):
        return str(value)
    real, imaginary = value.as_real_imag()
    if not (real.is_Float or real.is_Integer or real.is_Rational) or not imaginary.is_number:
        raise ValueError(f"{expression} has no value")
    size = max(abs(real), abs(imaginary))
    digits = _DIGITS
    if size >= 10**_DIGITS:  # 2^{100} and 2^{100}+1 differ in the last digit before the point
        before = int(sympy.log(size, 10).evalf(15)) + 1
        if before > _LONGEST:
            return f"as written {expression}"
        digits += before
        real, imaginary = sympy.N(expression, digits + _WORKING - _DIGITS, maxn=digits + 200, chop=False).as_real_imag()
    parts = [_rounded(part, size, digits) for part in (real, imaginary)]
    return parts[0] if parts[1] == "0" else f"{parts[0]}{'' if parts[1][0] == '-' else '+'}{parts[1]}i"


def _rounded(value: Any, size: Any, digits: int) -> str:
    """Return the number to so many digits, 0 where the other part of the number is that much larger."""
    import sympy

    if (
        size == 0
        or abs(value) < size * sympy.Float(10) ** -(digits + 5)
        or abs(value) < sympy.Float(10) ** -(_WORKING - 5)
    ):
        return "0"
    text = str(sympy.Float(value, digits))
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def _coordinate(name: str, point: int) -> Any:
    """Return where a variable is, at most 3 from 0: above it at point 0, below it at point 1, on either side at the
    others."""
    import sympy

    noise = int.from_bytes(hashlib.blake2b(f"{name}:{point}".encode(), digest_size=6).digest(), "big")
    place = sympy.Rational(noise % 10**12, 10**12) * 3
    return -place if point == 1 or (point > 1 and noise % 2) else place


def are_equal(gold: Any, answer: Any) -> bool:
    """Return whether math-verify calls two expressions equal: for those without fingerprints, such as equations."""
    from math_verify import verify

    return bool(verify([gold], [answer], float_rounding=12, timeout_seconds=None))
