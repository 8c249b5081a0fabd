"""Samples alike are found by an index, which finds what comparing each with each finds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.prepare import alike, rejection
from data_tools.prepare.alike import similarity
from data_tools.prepare.rejection import Config, buckets_of, shingles


@given(
    st.lists(st.text("abc ", min_size=0, max_size=24), max_size=12),
    st.sampled_from([0.3, 0.5, 0.8, 1.0]),
    st.sampled_from(["first", "diverse"]),
    st.integers(0, 4),
)
def test_the_index_finds_what_comparing_each_with_each_finds(
    texts: list[str], near: float, prefer: str, most: int
) -> None:
    config = Config(near_duplicate=near, per_prompt=most, prefer=prefer)
    runs = [shingles(text, 2) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rejection, "shingles", lambda text: shingles(text, 2))
        found = buckets_of(texts, [1] * len(texts), config)
    unlike: list[int] = []
    for place, text in enumerate(texts):
        like = near < 1 and any(similarity(runs[place], runs[other]) >= near for other in unlike)
        wanted = "duplicate" if text in [texts[other] for other in unlike] else "near_duplicate" if like else ""
        assert found[place] in ({wanted} if wanted else {"", "over_limit"}), (place, found)
        unlike += [] if wanted else [place]
    chosen, limit = unlike[:1], most or len(unlike)
    while prefer == "diverse" and len(chosen) < min(limit, len(unlike)):
        left = [place for place in unlike if place not in chosen]
        chosen.append(min(left, key=lambda place: max(similarity(runs[place], runs[other]) for other in chosen)))
    kept = chosen if prefer == "diverse" else unlike[:limit]
    assert {place for place in unlike if not found[place]} == set(kept)


def test_samples_of_one_prompt_are_not_each_compared_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(alike, "similarity", lambda a, b: compared.append(1) or similarity(a, b))
    for count in (100, 400):
        texts = [" ".join(f"w{number * 40 + place}" for place in range(30)) + " so it is" for number in range(count)]
        compared.clear()
        assert not any(buckets_of(texts, [1] * count, Config()))
        assert len(compared) <= count
