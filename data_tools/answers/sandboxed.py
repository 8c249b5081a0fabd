"""What runs in the two sandboxes of one verdict: a program that answers calls, and its tests, which make them.

    python -c TEXT-OF-confined.py BOUNDS TEXT-OF-THIS-FILE program CONNECTION CONNECTION
    python -c TEXT-OF-confined.py BOUNDS TEXT-OF-THIS-FILE tests CONNECTION RESULT

The tests call what the program defines over a socket. Values go by what they are, never as pickles, so that the program
can neither reach its tests nor change what `==`, `isclose` or `assert` mean there: it passes if its answers are right.
What is no plain data (an object of a class of the program's, a generator) stays with the program, and the tests hold a
`Remote` for it, which is equal to nothing else.

This file imports the standard library alone, as sandboxes see no other.
"""

import array
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
_Kinds = dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]]  # name: type, to and from what JSON has
_PLAIN: _Kinds = {
    "Decimal": (decimal.Decimal, str, decimal.Decimal),
    "Fraction": (fractions.Fraction, str, fractions.Fraction),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "timedelta": (datetime.timedelta, lambda value: [value.days, value.seconds, value.microseconds],
                  lambda given: datetime.timedelta(*given)),
    "float": (float, float.hex, float.fromhex),
    "int": (int, lambda value: int.__format__(value, "x"), lambda text: int(text, 16)),  # of any length
    "complex": (complex, lambda value: [value.real.hex(), value.imag.hex()],
                lambda given: complex(*map(float.fromhex, given))),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "array": (array.array, lambda value: [value.typecode, value.tobytes().hex()],
              lambda given: array.array(given[0], bytes.fromhex(given[1]))),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda given: range(*given)),
}  # fmt: skip
_pairs = operator.methodcaller("items")
_HOLDING: _Kinds = {  # to and from a list of other values
    "list": (list, iter, list),
    "tuple": (tuple, iter, tuple),
    "set": (set, iter, set),
    "frozenset": (frozenset, iter, frozenset),
    "deque": (collections.deque, iter, collections.deque),
    "keys": (type({}.keys()), iter, lambda items: dict.fromkeys(items).keys()),
    "items": (type({}.items()), iter, lambda items: dict(items).items()),
    "Counter": (collections.Counter, _pairs, lambda items: collections.Counter(dict(items))),
    "OrderedDict": (collections.OrderedDict, _pairs, collections.OrderedDict),
    "dict": (dict, _pairs, dict),
}


# -- values -----------------------------------------------------------------------------------------------------------


def packed(value: Any, refer: Callable[[Any], Any]) -> Any:
    """Return a value as JSON that says its type; `refer` says what stands for what is no plain data."""
    if value is None or isinstance(value, (bool, str)):
        return value
    for name, (kind, told, _) in _PLAIN.items():
        if isinstance(value, kind):
            return {name: told(value)}
    for name, (kind, items, _) in _HOLDING.items():
        if isinstance(value, kind):
            return {name: [packed(item, refer) for item in items(value)]}
    return refer(value)


def unpacked(told: Any, referred: Callable[[Any], Any]) -> Any:
    """Return the value that JSON of `packed` stands for. Raise ValueError, KeyError or TypeError for what is none."""
    if not isinstance(told, dict):
        return told
    [(name, given)] = told.items()
    if name in _PLAIN:
        return _PLAIN[name][2](given)
    if name in _HOLDING:
        return _HOLDING[name][2]([unpacked(item, referred) for item in given])
    return referred(told)


def _built_in(value: Any) -> str:
    """Return the name that Python has built in for a value, "" where it has none."""
    return next((name for name, own in vars(builtins).items() if own is value), "")


def _is_named(value: Any) -> bool:
    """Return whether a program may give a value by such a name: a type, or `...`; no function, since tests may call
    what they get."""
    return isinstance(value, type) or value is ... or value is NotImplemented


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
        before = {**dict(enumerate(asked["given"])), **asked["named"]}  # by place or name
        values = {place: unpacked(item, self._referred) for place, item in before.items()}
        given, named = [values[place] for place in range(len(asked["given"]))], {n: values[n] for n in asked["named"]}
        told = packed(self._do(asked["do"], asked["of"], given, named), self._refer)
        after = {place: packed(value, self._refer) for place, value in values.items()} if asked["do"] == "call" else {}
        return {"gave": told, "changed": [[place, new] for place, new in after.items() if before[place] != new]}

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
        if _is_named(value) and (name := _built_in(value)):
            return {"builtin": name}
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
                item = next(walk)
            except StopIteration:
                return
            yield item

    def __next__(self) -> Any:
        [item] = self._calls.ask("next", self._of)
        return item


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
        for place, told in answer["changed"]:
            _become(named[place] if isinstance(place, str) else given[place], unpacked(told, self._referred))
        return unpacked(answer["gave"], self._referred)

    def _referred(self, told: Any) -> Any:
        if isinstance(told.get("builtin"), str) and _is_named(value := getattr(builtins, told["builtin"], None)):
            return value
        if not isinstance(told.get("object"), int):
            raise ValueError("no object")
        return Remote(self, told["object"])


def _told(value: Any) -> Any:
    """Return what stands for a remote value on its way back, or for what Python has built in (int, len). Raise
    Unsupported for what is of the tests alone."""
    if name := _built_in(value):
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
    if isinstance(mine, (list, bytearray, array.array)) and isinstance(mine, type(new)):
        mine[:] = new
    elif isinstance(mine, (set, dict, collections.deque)) and type(mine) is type(new):
        mine.clear()
        (mine.extend if isinstance(mine, collections.deque) else mine.update)(new)


_OF_THE_ROW = (ImportError, SyntaxError, NameError)  # of tests that ask for what is not here: numpy, a lost name


def judge(connection: Connection, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"passed", "why"} of the tests of `given`: the program's source, what the tests need and may call."""
    try:
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
        return {"passed": False, "why": str(error)}
    except Unsupported as error:
        return {"passed": None, "why": str(error)}
    except BaseException as error:
        unknown = isinstance(error, _OF_THE_ROW) and not isinstance(error.__cause__, _OfProgram)
        return {"passed": None if unknown else False, "why": f"{type(error).__name__}: {error}"[:500]}
    return {"passed": True, "why": ""}


def main(role: str, connection: str, result: str) -> None:
    if role == "program":
        serve(Connection(int(connection)))
        return
    program, told = Connection(int(connection)), Connection(int(result))
    stands = begun(program)
    told.send(stands)  # nothing that is sent later can say that a sandbox does not stand
    if stands:
        told.send(judge(program, told.receive()))


def begun(program: Connection) -> bool:
    """Return whether the sandbox of the program, which it was not sent yet, stands."""
    try:
        return program.receive() == "ready"
    except Gone:
        return False


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)  # a program may print what it counts; a setting of the process, so not in main()
    main(*sys.argv[1:])
