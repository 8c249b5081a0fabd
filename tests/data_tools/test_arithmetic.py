from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.tasks.arithmetic import MAX_CHARACTERS, evaluate, format_number, parse_number, read

numbers = st.decimals(0, 10**6, places=2).map(lambda value: format_number(Fraction(value)))
expressions = st.recursive(
    numbers,
    lambda inner: st.builds("{}{}{}".format, inner, st.sampled_from("+-*/"), inner) | inner.map("({})".format),
    max_leaves=8,
)


@given(expressions)
def test_value_is_that_of_exact_rational_arithmetic(expression: str) -> None:
    as_python = "".join(f"Fraction('{token}')" if token[0].isdigit() else token for token in _tokens(expression))
    try:
        expected = eval(as_python)  # noqa: S307 - the test's own oracle on its own text
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="division by zero"):
            evaluate(expression)
    else:
        assert evaluate(expression) == expected


def _tokens(expression: str) -> list[str]:
    from data_tools.tasks.arithmetic import tokenize

    return tokenize(expression)


@given(expressions)
def test_canonical_spelling_is_a_fixed_point_with_the_same_value(expression: str) -> None:
    try:
        value, spelled = read(expression)
    except ValueError:
        return
    assert read(spelled) == (value, spelled)


@pytest.mark.parametrize(
    ("written", "spelled", "value"),
    [
        ("18*.5", "18*0.5", "9"),
        (" $1,200.00 * 2 ", "1200*2", "2400"),
        ("+30+46", "30+46", "76"),
        ("71+-3", "71+-3", "68"),
        ("560//10", "560/10", "56"),
        ("7//2", "7//2", "3"),
        ("5.*2", "5*2", "10"),
        ("3*+6", "3*6", "18"),
        ("-48/4", "-48/4", "-12"),
        ("12-3-4", "12-3-4", "5"),
        ("64/4/2", "64/4/2", "8"),
    ],
)
def test_what_people_write_is_read(written: str, spelled: str, value: str) -> None:
    assert read(written) == (Fraction(value), spelled)


@pytest.mark.parametrize(
    "text", ["", "+", "3+", "(3", "3)", "3 4", "2**3", "2^3", "x", "1e9", "3+4=7", "()", "1,23+1", "4/0", "(" * 400]
)
def test_what_is_no_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        evaluate(text)


def test_a_hostile_length_is_refused_before_it_costs() -> None:
    with pytest.raises(ValueError, match=str(MAX_CHARACTERS)):
        evaluate("9" * 10**6)
    assert parse_number("9" * 10**6) is None


@given(st.fractions(-(10**9), 10**9, max_denominator=10**4))
def test_a_number_survives_its_spelling(value: Fraction) -> None:
    spelled = format_number(value)
    if spelled is None:
        assert any(value.denominator % prime == 0 for prime in range(3, value.denominator + 1) if prime % 5)
    else:
        assert parse_number(spelled) == value
        assert not spelled.endswith(".") and ("." not in spelled or not spelled.endswith("0"))


@pytest.mark.parametrize("text", ["48/2", "", ".", "-", "1.2.3", "٣", "1 2", "NaN", "inf", "1_0", "--3"])
def test_a_number_is_only_a_number(text: str) -> None:
    assert parse_number(text) is None
