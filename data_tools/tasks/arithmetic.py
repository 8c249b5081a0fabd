"""Exact arithmetic on the text of an expression: `48/2`, `(3+4)*2.5`, `$1,200 * .5`.

    expression = term (("+" | "-") term)*
    term       = factor (("*" | "/" | "//") factor)*
    factor     = ("+" | "-") factor | "(" expression ")" | number

Rational throughout (`fractions.Fraction`), left to right, never `eval()`. `//` is floor division: two of GSM8K's
23,716 training marks write it.
"""

import re
from fractions import Fraction
from functools import lru_cache

MAX_CHARACTERS = 512  # a longer text is no calculator mark; bounds the size of the integers
MAX_DEPTH = 64  # of parentheses and signs, far above the 3 that GSM8K nests

_TOKEN = re.compile(r"\d+\.?\d*|\.\d+|//|[-+*/()]")
_NUMBER = re.compile(r"([-+]?)(\d*)(?:\.(\d*))?")
_PLAIN = re.compile(r"[0-9.+*/()-]*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def clean(text: str) -> str:
    """Return a number's text without what people write around numbers: white space, currency signs, thousands
    separators.

    White space between two digits is kept: `1 2` is no number.
    """
    if _PLAIN.fullmatch(text):
        return text
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text.strip())
    return _THOUSANDS.sub("", re.sub("[$€£¥]", "", text))


def parse_number(text: str) -> Fraction | None:
    """Return the value of one decimal number (`-75.00`, `.5`, `$1,200`), None when the text is anything else."""
    text = clean(text)
    if text.isascii() and text.isdigit() and len(text) <= MAX_CHARACTERS:
        return Fraction(int(text))
    match = _NUMBER.fullmatch(text) if text.isascii() and len(text) <= MAX_CHARACTERS else None
    if match is None or not (match[2] or match[3]):
        return None
    value = Fraction(f"{match[2] or 0}.{match[3] or 0}")
    return -value if match[1] == "-" else value


def format_number(value: Fraction) -> str | None:
    """Return the shortest decimal spelling: 75.00 → `75`, .5 → `0.5`; None where it has no finite one (1/3)."""
    if value.denominator == 1:
        return str(value.numerator)
    places, rest = 0, value.denominator
    while rest % 10 == 0:
        places, rest = places + 1, rest // 10
    for prime in (2, 5):
        while rest % prime == 0:
            places, rest = places + 1, rest // prime
    if rest != 1:
        return None
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    sign = "-" if value < 0 else ""
    return f"{sign}{digits[:-places]}.{digits[-places:]}"


def tokenize(expression: str) -> list[str]:
    """Return numbers, operators and parentheses in order. Raise ValueError naming what is neither."""
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"an expression of {len(expression)} characters; at most {MAX_CHARACTERS}")
    tokens, position = [], 0
    while position < len(expression):
        match = _TOKEN.match(expression, position)
        if match is None:
            raise ValueError(f"{expression[position]!r} at character {position + 1} of {expression!r}")
        tokens.append(match[0])
        position = match.end()
    return tokens


class _Reader:
    """Reads by recursive descent over the tokens of one expression; `spelled` collects its canonical text on the
    way."""

    def __init__(self, expression: str):
        self.tokens = tokenize(expression)
        self.next = 0
        self.depth = 0
        self.spelled: list[str] = []

    def peek(self) -> str:
        return self.tokens[self.next] if self.next < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.next += 1
        self.spelled.append(token)
        return token

    def expression(self) -> Fraction:
        value = self.term()
        while self.peek() in ("+", "-"):
            value = value + self.term() if self.take() == "+" else value - self.term()
        return value

    def term(self) -> Fraction:
        value = self.factor()
        while self.peek() in ("*", "/", "//"):
            operator = self.take()
            place = len(self.spelled) - 1
            right = self.factor()
            if operator == "*":
                value *= right
            elif right == 0:
                raise ValueError("division by zero")
            else:
                quotient = value / right
                if operator == "//" and quotient.denominator == 1:
                    self.spelled[place] = "/"  # an exact floor division is a division
                value = Fraction(quotient.__floor__()) if operator == "//" else quotient
        return value

    def factor(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} parentheses and signs inside each other")
        value = self.primary()
        self.depth -= 1
        return value

    def primary(self) -> Fraction:
        token = self.take()
        if token == "+":
            self.spelled.pop()
            return self.factor()
        if token == "-":
            return -self.factor()
        if token == "(":
            value = self.expression()
            if self.take() != ")":
                raise ValueError("a parenthesis is not closed")
            return value
        number = parse_number(token)
        if number is None:
            raise ValueError(f"a number is missing before {token!r}" if token else "it ends where a number is due")
        self.spelled[-1] = format_number(number) or token
        return number


@lru_cache(maxsize=1 << 14)
def read(expression: str) -> tuple[Fraction, str]:
    """Return (value, canonical spelling): numbers in shortest form, no unary plus, nothing around them.

    Raise ValueError with the reason where it is no arithmetic.
    """
    reader = _Reader(clean(expression))
    value = reader.expression()
    if reader.peek():
        raise ValueError(f"{reader.peek()!r} follows a complete expression")
    return value, "".join(reader.spelled)


def evaluate(expression: str) -> Fraction:
    """Return the exact value; ValueError with the reason where it is no arithmetic."""
    return read(expression)[0]
