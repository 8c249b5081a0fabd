"""Ways in which an input comes damaged, by accident or by a hand: one drawn damage of any text or binary file."""

import random
import re
from collections.abc import Callable

_SCALAR = re.compile(rb'"[^"\\\n]*"|-?\d+(?:\.\d+)?|\b(?:true|false|null)\b|(?<=[:\[,] )[A-Za-z_][\w.${}-]*')
_MEMBER = re.compile(rb'("?[A-Za-z_][\w.]*"?)(\s*:\s*)("[^"\\\n]*"|[\w.+-]+)')
_LETTER = re.compile(rb"[A-Za-z]")
# What stands in the place of another value: of a wrong type, too large, not finite, no Unicode, not to be held.
VALUES = (
    b"null", b"true", b"[]", b"{}", b"-1", b"0", b"1.5", b'""', b'"x"', b"[1, [2]]", b'{"a": {"b": null}}',
    b"NaN", b"-Infinity", b"1e999", b".inf", b".nan", b"9" * 30, b"1" * 5000, b"-0.0", b"1e-400",
    b'"\\ud800"', b'"\\u0000"', b'"\\u001b[31m"', b'"../x"', b'"/etc/passwd"', b'"${oc.env:HOME}"', b"${params.none}",
    b"!!int x", b"!!python/object/apply:os.system [id]", b"*a", b"&a [*a]", b"2026-02-30", b"0x1", b"1_000", b"~",
    b'"' + b"x" * 3000 + b'"', b"'", b'"', b"|", b"? [", b"<<: 3",
)  # fmt: skip


def _flip(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def _flips(data: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.randrange(2, 30)):
        data = _flip(data, draw)
    return data


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _drop(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.randrange(1, 20) :]


def _double(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    stop = start + draw.randrange(1, 60)
    return data[:stop] + data[start:stop] + data[stop:]


def _line(data: bytes, draw: random.Random) -> bytes:
    """Double a line, or drop one, or put one elsewhere."""
    lines = data.splitlines(keepends=True)
    line = draw.randrange(len(lines))
    how = draw.choice(["double", "drop", "move"])
    taken = lines[line] if how == "double" else lines.pop(line)
    if how != "drop":
        lines.insert(draw.randrange(len(lines) + 1), taken)
    return b"".join(lines)


def _insert(data: bytes, draw: random.Random) -> bytes:
    more = draw.choice([b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\xe2\x80\xa8", b"\t",
                        b"\x1b[2J", b"#", b"%", b"}", b"]", b",", b":", b"{{", b"{%", b"\xf0\x9f\x98\x80"])  # fmt: skip
    place = draw.randrange(len(data) + 1)
    return data[:place] + more + data[place:]


def _value(data: bytes, draw: random.Random) -> bytes:
    found = [match.span() for match in _SCALAR.finditer(data)]
    if not found:
        return _flip(data, draw)
    start, stop = draw.choice(found)
    return data[:start] + draw.choice(VALUES) + data[stop:]


def _number(data: bytes, draw: random.Random) -> bytes:
    digits = [match.start() for match in re.finditer(rb"\d", data)]
    if not digits:
        return _flip(data, draw)
    place = draw.choice(digits)
    return data[:place] + bytes([draw.choice([digit for digit in b"0123456789" if digit != data[place]])]) + data[
        place + 1 :
    ]  # fmt: skip


def _swap(data: bytes, draw: random.Random) -> bytes:
    found = [match.span() for match in _SCALAR.finditer(data)]
    if len(found) < 2:
        return _flip(data, draw)
    (a, b), (c, d) = sorted(draw.sample(found, 2))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _key_twice(data: bytes, draw: random.Random) -> bytes:
    found = list(_MEMBER.finditer(data))
    if not found:
        return _double(data, draw)
    one = draw.choice(found)
    other = one[3] if draw.random() < 0.3 else draw.choice(found)[3] if draw.random() < 0.5 else draw.choice(VALUES)
    comma = b", " if data[one.end() : one.end() + 1] in (b",", b"}") or one[1].startswith(b'"') else b"\n"
    return data[: one.start()] + one[1] + one[2] + other + comma + data[one.start() :]


def _other_key(data: bytes, draw: random.Random) -> bytes:
    found = list(_MEMBER.finditer(data))
    if not found:
        return _flip(data, draw)
    one = draw.choice(found)
    places = [one.start(1) + match.start() for match in _LETTER.finditer(one[1])]
    if not places:
        return _flip(data, draw)
    place = draw.choice(places)
    return data[:place] + bytes([97 + draw.randrange(26)]) + data[place + 1 :]


def _deep(data: bytes, draw: random.Random) -> bytes:
    found = [match.span() for match in _SCALAR.finditer(data)] or [(0, len(data))]
    start, stop = draw.choice(found)
    levels = draw.choice([5, 150, 400, 3000, 60_000])
    opened, closed = draw.choice([(b"[", b"]"), (b'{"a": ', b"}"), (b"(", b")"), (b"- ", b"")])
    middle = data[start:stop] if draw.random() < 0.8 else b""
    return data[:start] + opened * levels + middle + closed * levels * (draw.random() < 0.8) + data[stop:]


def _encoded(data: bytes, draw: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    codec = draw.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp1252", "utf-7", "cp500"])
    return text.encode(codec, "replace")


def _other_ends(data: bytes, draw: random.Random) -> bytes:
    return data.replace(b"\n", draw.choice([b"\r\n", b"\r", b"\n\n", b"", b"\0", b"\x0b"]))


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit": _flip, "bits": _flips, "cut": _cut, "drop": _drop, "double": _double, "line": _line, "insert": _insert,
    "value": _value, "number": _number, "swap": _swap, "key twice": _key_twice, "other key": _other_key, "deep": _deep,
    "encoding": _encoded, "line ends": _other_ends,
}  # fmt: skip
_OFTEN = ("value", "value", "key twice", "other key", "insert")  # beside one of each


def damaged(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One damage, at times two: what was done, and the bytes."""
    names = [draw.choice([*DAMAGES, *_OFTEN]) for _ in range(1 if draw.random() < 0.85 else 2)]
    for name in names:
        data = DAMAGES[name](data, draw) if data else data
    return " + ".join(names), data
