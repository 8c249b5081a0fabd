"""What runs in the two sandboxes of one verdict: a program that answers calls, and its tests, which make them.

    python -c TEXT-OF-confined.py BOUNDS TEXT-OF-THIS-FILE program CONNECTION CONNECTION
    python -c TEXT-OF-confined.py BOUNDS TEXT-OF-THIS-FILE tests CONNECTION RESULT

The tests call what the program defines over a socket. Values go by what they are, never as pickles, so that the program
can neither reach its tests nor change what `==`, `isclose` or `assert` mean there: it passes if its answers are right.
What is no plain data (an object of a class of the program's, a generator) stays with the program, and the tests hold a
`Remote` for it, which is equal to nothing else.

This file imports the standard library alone, as sandboxes see no other.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import json
import math
import operator
import socket
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

LONGEST = 32 << 20  # bytes of a message
NOT_BEGUN = "the sandbox did not begin"
_TEXTS: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {  # name: type, to and from text
    "Decimal": (decimal.Decimal, str, decimal.Decimal),
    "Fraction": (fractions.Fraction, str, fractions.Fraction),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "float": (float, float.hex, float.fromhex),
    "int": (int, lambda value: int.__format__(value, "x"), lambda text: int(text, 16)),  # of any length
}
_LISTS: dict[str, Any] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque,
}  # fmt: skip


# -- values -----------------------------------------------------------------------------------------------------------


def packed(value: Any, refer: Callable[[Any], Any]) -> Any:
    """Return a value as JSON that says its type; `refer` says what stands for what is no plain data."""
    if value is None or isinstance(value, (bool, str)):
        return value
    for name, (kind, told, _) in _TEXTS.items():
        if isinstance(value, kind):
            return {name: told(value)}
    for name, kind in _LISTS.items():
        if isinstance(value, kind):
            return {name: [packed(item, refer) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[packed(key, refer), packed(item, refer)] for key, item in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    return refer(value)


def unpacked(told: Any, referred: Callable[[Any], Any]) -> Any:
    """Return the value that JSON of `packed` stands for. Raise ValueError, KeyError or TypeError for what is none."""
    if not isinstance(told, dict):
        return told
    [(name, given)] = told.items()
    if name in _TEXTS:
        return _TEXTS[name][2](given)
    if name in _LISTS:
        return _LISTS[name]([unpacked(item, referred) for item in given])
    if name == "dict":
        return {unpacked(key, referred): unpacked(item, referred) for key, item in given}
    if name == "bytes":
        return bytes.fromhex(given)
    if name == "complex":
        return complex(float.fromhex(given[0]), float.fromhex(given[1]))
    if name == "range":
        return range(*given)
    return referred(told)


class Gone(BaseException):
    """Raised where the other side has ended its process, or sends what is no message. Tests do not catch it."""


class Connection:
    """Represents one end of a socket, over which messages go: JSON after its length."""

    def __init__(self, number: int):
        self._socket = socket.socket(fileno=number)
        self._until = math.inf

    def limit(self, seconds: float) -> None:
        """Let all that follows be over in so many seconds; after them the other side is gone."""
        self._until = time.monotonic() + seconds

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        try:
            self._wait()
            self._socket.sendall(struct.pack("!I", len(data)) + data)
        except OSError as error:
            raise Gone(str(error)) from None

    def receive(self) -> Any:
        [size] = struct.unpack("!I", self._exactly(4))
        if size > LONGEST:
            raise Gone(f"a message of {size:,} bytes; {LONGEST:,} are the most")
        try:
            return json.loads(self._exactly(size))
        except (ValueError, RecursionError):
            raise Gone("what was sent is no message") from None

    def _wait(self) -> None:
        if self._until < math.inf:
            self._socket.settimeout(max(1e-3, self._until - time.monotonic()))

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                self._wait()
                more = self._socket.recv(min(size - len(data), 1 << 20))
            except TimeoutError:
                raise Gone("it ran past its time limit") from None
            except OSError:
                more = b""
            if not more:
                raise Gone("the program ended its process")
            data += more
        return bytes(data)


# -- the program's side -----------------------------------------------------------------------------------------------


class _Program:
    """Represents the program that was run as a module, and what its tests hold of it."""

    def __init__(self, source: str):
        self._kept: list[Any] = []
        self.module = types.ModuleType("program")
        sys.modules["program"] = self.module  # dataclasses and pickle look there
        exec(compile(source, "program", "exec"), self.module.__dict__)

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a call, and arguments that it changed."""
        given = [unpacked(item, self._referred) for item in asked["given"]]
        named = {name: unpacked(item, self._referred) for name, item in asked["named"].items()}
        result = self._do(asked["do"], asked["of"], given, named)
        told = packed(result, self._refer)
        after = [packed(item, self._refer) for item in given] if asked["do"] == "call" else asked["given"]
        changed = {str(place): new for place, (old, new) in enumerate(zip(asked["given"], after)) if old != new}
        return {"gave": told, "changed": changed}

    def _do(self, what: str, of: Any, given: list[Any], named: dict[str, Any]) -> Any:
        target = getattr(self.module, of) if isinstance(of, str) else self._kept[of]
        if what == "call":
            return target(*given, **named)
        if what == "next":
            return [next(target)]
        simple: dict[str, Callable[..., Any]] = {
            "getattr": getattr, "getitem": operator.getitem, "setattr": setattr, "setitem": operator.setitem,
            "len": len, "iter": iter, "str": str,
        }  # fmt: skip
        return simple[what](target, *given)

    def _refer(self, value: Any) -> Any:
        place = next((place for place, kept in enumerate(self._kept) if kept is value), len(self._kept))
        if place == len(self._kept):
            self._kept.append(value)
        return {"object": place}

    def _referred(self, told: Any) -> Any:
        if "builtin" in told:
            return getattr(builtins, told["builtin"])
        of = told["object"]
        return getattr(self.module, of) if isinstance(of, str) else self._kept[of]


def serve(connection: Connection) -> None:
    """Run the program that the tests' side sends, and answer its calls until it is gone."""
    connection.send("ready")  # the sandbox stands; whatever comes now is the program's doing
    source = connection.receive()
    try:
        program = _Program(source)
        connection.send({"gave": None})
    except BaseException as error:  # SystemExit too
        connection.send(_raised(error))
        return
    while True:
        asked = connection.receive()
        try:
            answer = program.answer(asked)
        except BaseException as error:
            answer = _raised(error)
        connection.send(answer)


def _raised(error: BaseException) -> dict[str, Any]:
    try:
        text = str(error)
    except BaseException:
        text = ""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    return {"raised": [kinds[0], text[:500]]}


# -- the tests' side --------------------------------------------------------------------------------------------------


class Remote:
    """Represents what the program defines, or an object that stays with it: it can be called, read, changed and walked
    through, and is equal to nothing but itself."""

    def __init__(self, calls: "_Calls", of: str | int):
        self.__dict__.update(_calls=calls, _of=of)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._calls.ask("call", self._of, given, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._calls.ask("getattr", self._of, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._calls.ask("setattr", self._of, (name, value))

    def __getitem__(self, key: Any) -> Any:
        return self._calls.ask("getitem", self._of, (key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._calls.ask("setitem", self._of, (key, value))

    def __len__(self) -> int:
        return self._calls.ask("len", self._of)

    def __str__(self) -> str:
        return self._calls.ask("str", self._of)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        walk = self._calls.ask("iter", self._of)
        while isinstance(walk, Remote):
            try:
                [item] = self._calls.ask("next", walk._of)
            except StopIteration:
                return
            yield item


class _Calls:
    """Makes the calls into the program."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self.failed: Gone | Unsupported | None = None  # which a test may have caught

    def ask(self, what: str, of: Any, given: tuple = (), named: Mapping[str, Any] = {}) -> Any:
        """Return what the program gave; what it did to lists, sets and mappings is done to those of the tests, too."""
        try:
            return self._ask(what, of, given, named)
        except (Gone, Unsupported) as error:
            self.failed = error
            raise

    def _ask(self, what: str, of: Any, given: tuple, named: Mapping[str, Any]) -> Any:
        self._connection.send({"do": what, "of": of, "given": [packed(item, _told) for item in given],
                               "named": {name: packed(item, _told) for name, item in named.items()}})  # fmt: skip
        answer = self._connection.receive()
        if "raised" in answer:
            raise _exception(*answer["raised"])
        for place, told in answer["changed"].items():
            _become(given[int(place)], unpacked(told, self._referred))
        return unpacked(answer["gave"], self._referred)

    def _referred(self, told: Any) -> "Remote":
        if not isinstance(told["object"], int):
            raise ValueError("no object")
        return Remote(self, told["object"])


def _told(value: Any) -> Any:
    """Return what stands for a remote value on its way back, or for what Python has built in (int, len). Raise
    Unsupported for what is of the tests alone."""
    name = getattr(value, "__name__", "")
    if name and getattr(builtins, name, None) is value:
        return {"builtin": name}
    if not isinstance(value, Remote):
        raise Unsupported(f"a {type(value).__name__} cannot be handed to the program")
    return {"object": value._of}


class Unsupported(BaseException):
    """Raised where tests ask for what cannot be asked here; that is no fault of the program."""


def _exception(kind: str, text: str) -> BaseException:
    """Return the exception that a call raised, as far as it is one of Python's own."""
    found = getattr(builtins, str(kind), None)
    if isinstance(found, type) and issubclass(found, Exception):
        try:
            return _marked(found(text))
        except TypeError:  # UnicodeDecodeError wants more than a text
            pass
    return _marked(RuntimeError(f"{kind}: {text}"))


def _marked(error: Exception) -> Exception:
    """Return an error that tells that it is the program's: of the tests' own, some are no fault of it."""
    error.__cause__ = _OfProgram()
    return error


class _OfProgram(Exception):
    """Stands as the cause of an error that the program raised."""


def _become(mine: Any, new: Any) -> None:
    if isinstance(mine, list) and isinstance(new, list):
        mine[:] = new
    elif isinstance(mine, (set, dict)) and type(mine) is type(new):
        mine.clear()
        mine.update(new)


_OF_THE_ROW = (ImportError, SyntaxError, NameError)  # of tests that ask for what is not here: numpy, a lost name


def judge(connection: Connection, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"passed", "why"} of the tests of `given`: the program's source, what the tests need and may call."""
    begun = False
    try:
        if connection.receive() != "ready":
            raise Gone("what was sent is no message")
        begun = True
        connection.send(given["program"])
        loaded = connection.receive()
        if "raised" in loaded:
            return {"passed": False, "why": ": ".join(loaded["raised"])}
        calls = _Calls(connection)
        theirs: dict[str, Any] = {name: Remote(calls, name) for name in given["calls"]}
        names = {"__name__": "tests", **theirs}
        exec(compile(given["setup"], "setup", "exec"), names)
        names |= theirs  # what the setup may define, too: HumanEval's heads do
        for number, test in enumerate(given["tests"], 1):
            exec(compile(test, f"test {number}", "exec"), names)
        if calls.failed:
            raise calls.failed
    except Gone as error:
        return {"passed": False, "why": str(error)} if begun else {"passed": None, "why": NOT_BEGUN}
    except Unsupported as error:
        return {"passed": None, "why": str(error)}
    except BaseException as error:
        unknown = isinstance(error, _OF_THE_ROW) and not isinstance(error.__cause__, _OfProgram)
        return {"passed": None if unknown else False, "why": f"{type(error).__name__}: {error}"[:500]}
    return {"passed": True, "why": ""}


def main(role: str, connection: str, result: str) -> None:
    sys.set_int_max_str_digits(0)
    if role == "program":
        serve(Connection(int(connection)))
        return
    told = Connection(int(result))
    told.send("ready")
    told.send(judge(Connection(int(connection)), told.receive()))


if __name__ == "__main__":
    main(*sys.argv[1:])
