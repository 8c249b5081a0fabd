"""A key stands once in a mapping, however it is spelled; the second is refused with both lines."""

import itertools

import pytest
import yaml

from data_tools.base.yaml_loaders import TextLoader, ValueLoader, read_values

SAME = [  # keys that are one to whoever reads the mapping
    ["a", '"a"', "'a'", "!!str a"],
    ["1", "0x1", "+1", '"1"', "0x01"],
    ["1", "1.0", "true"],  # equal in Python
    ["true", "True", "'True'"],
    ["null", "~", '"None"'],
    ["1e3", "1000.0", "1000"],
]
TWICE = sorted({pair for group in SAME for pair in itertools.permutations(group, 2)})


@pytest.mark.parametrize("first, second", TWICE, ids=repr)
@pytest.mark.parametrize("above", ["", "top:\n"])
def test_a_key_that_stands_twice_is_refused_with_both_lines(above, first, second):
    lines = [f"{first}: x", "z: 0", f"{second}: y"]
    with pytest.raises(yaml.YAMLError, match=r"stands twice, on line \d+ and on line \d+"):
        read_values(above + "".join(f"{'  ' if above else ''}{line}\n" for line in lines))


def test_text_keys_are_told_apart_by_their_text():
    with pytest.raises(yaml.YAMLError, match="stands twice, on line 1 and on line 2"):
        yaml.load("a: 1\n'a': 2\n", TextLoader)
    assert yaml.load("1: a\n0x1: b\n", TextLoader) == {"1": "a", "0x1": "b"}


@pytest.mark.parametrize("text, expected", [
    ("base: &b {x: 1, y: 2}\nhere: {<<: *b, y: 3}", {"x": 1, "y": 3}),  # what merges are for
    ("base: &b {x: 1}\nmore: &m {<<: *b, x: 2}\nhere: {<<: *m}", {"x": 2}),
    ("base: &b {x: 1}\nmore: &m {z: 2}\nhere: {<<: [*b, *m], y: 3}", {"x": 1, "z": 2, "y": 3}),
])  # fmt: skip
def test_a_merge_gives_what_the_mapping_does_not_write(text, expected):
    assert read_values(text)["here"] == expected


@pytest.mark.parametrize("text, expected", [
    ("base: &b {x: 1}\nmore: &m {x: 2}\nhere: {<<: [*b, *m]}", "'x' stands twice, on line 1 and on line 2"),
    ("base: &b {x: 1}\nhere:\n  <<: *b\n  <<: *b", "'<<' stands twice"),
    ("base: &b {x: 1}\nhere: {<<: *b, y: 1, 'y': 2}", "'y' stands twice"),
    ("here: &h {<<: *h}", "holds itself"), ("here: {<<: 3}", "wants other mappings"),
    ("? [a]\n: 1", "is no key"), ("{a: 1}: 2", "is no key"),
])  # fmt: skip
def test_merges_that_contradict_each_other_and_keys_that_are_none_are_refused(text, expected):
    with pytest.raises(yaml.YAMLError, match=expected.replace("[", r"\[")):
        read_values(text)


@pytest.mark.parametrize("text", ["a: &x {b: *x}", "a: &x [1, [*x]]", "a: &x {<<: *x, c: 1}", "&a {? *a : 1}"])
@pytest.mark.parametrize("loader", [ValueLoader, TextLoader])
def test_a_value_that_holds_itself_is_refused(text, loader):
    with pytest.raises(yaml.YAMLError, match="holds itself"):
        yaml.load(text, loader)


def test_a_value_may_stand_in_two_places():
    assert read_values("a: &x [1]\nb: [*x, *x]") == {"a": [1], "b": [[1], [1]]}
