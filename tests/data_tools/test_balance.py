from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.records.balance import Balance, SourceBalance

counts = st.integers(0, 1000)
buckets = st.dictionaries(st.sampled_from(["duplicate", "too_long", "wrong_answer"]), st.integers(1, 1000))


@st.composite
def sheets(draw: st.DrawFn) -> Balance:
    def source(name: str) -> SourceBalance:
        lines, rows, cut = Counter(draw(buckets)), Counter(draw(buckets)), Counter(draw(buckets))
        with_rows, kept, tokens = draw(counts), draw(counts), draw(counts)
        return SourceBalance(
            name,
            with_rows + lines.total(),
            with_rows,
            lines,
            kept + rows.total(),
            kept,
            rows,
            tokens + cut.total(),
            tokens,
            cut,
            tokens // 2,
        )

    return Balance([source("a"), source("b")])


@given(sheets(), sheets())
def test_sheets_that_add_up_still_do_when_added(first: Balance, second: Balance) -> None:
    both = first + second
    both.check()
    assert both.total().rows == first.total().rows + second.total().rows
    assert both.total().dropped == first.total().dropped + second.total().dropped


@given(sheets())
def test_json_keeps_a_sheet(sheet: Balance) -> None:
    assert Balance.from_json(sheet.to_json()).to_json() == sheet.to_json()


@given(
    sheets(),
    st.sampled_from(["lines", "lines_with_rows", "rows", "kept", "tokens", "tokens_in"]),
    st.sampled_from([-1, 1]),
)
def test_a_count_that_is_off_by_one_is_found(sheet: Balance, name: str, by: int) -> None:
    source = sheet.sources[1]
    setattr(source, name, getattr(source, name) + by)
    with pytest.raises(ValueError, match="^b: "):
        sheet.check()


@given(sheets())
def test_the_table_has_every_bucket_and_its_rows_add_up(sheet: Balance) -> None:
    table = sheet.table()
    assert [row[0] for row in table["rows"]] == ["a", "b", "total"]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    first, second, total = (row[1:] for row in table["rows"])
    assert [a + b for a, b in zip(first, second)] == total
    assert set(sheet.total().dropped) <= set(table["columns"])


def test_shares_of_different_sources_do_not_add() -> None:
    with pytest.raises(ValueError, match="'a' and 'b'"):
        SourceBalance("a") + SourceBalance("b")
