"""Where the ranks of one element meet: keys and values in the memory of rank 0, behind a door that needs a key.

torch's TCPStore answers whoever connects, and lists its keys. Here both sides prove, before a word is exchanged, that
they hold the same secret `key`, which lies in a file that only the user may read:

    server   32 random bytes
    client   32 random bytes, HMAC-SHA256(key, "client", meeting, port, both)
    server   HMAC-SHA256(key, "server", meeting, port, both)

`meeting` names the element and its start, so that a job whose port another one took is not let in by mistake; `port` is
the one that is connected to, so that nobody can pass a proof on from another. Ports are tried in an order that follows
from key and meeting: a stranger does not know which one to take first. Rank 0 listens on the address that the others
were told, and on no other.

What is exchanged afterwards is not encrypted: whoever can read another user's connections is root.
"""

import hashlib
import hmac
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.mistake import UserMistake

NONCE = 32  # bytes, and those of an HMAC-SHA256
PROOF_S = 5.0  # to prove oneself in
LONGEST = 1 << 28  # bytes of a request or an answer
CANDIDATES = 64  # ports
MARGIN_S = 30.0  # from the server's time limit to the client's own


class MeetingFailed(ConnectionError):
    """Raised when the others cannot be reached, or left."""


class MeetingTimeout(TimeoutError):
    """Raised when a key was not set in time."""


@dataclass(frozen=True)
class Meeting:
    """Says where ranks meet (an IPv4 or IPv6 address and ports to choose from), under which name, with which key."""

    address: str
    ports: range
    name: str
    key: bytes = field(repr=False)
    spared: int | None = None  # the port that was promised to somebody else, taken only where there is no other
    key_file: str = ""  # where the key lies, so that the environment, which programs print, need not hold it

    def candidates(self) -> list[int]:
        """Return the ports to try, in their order: known to holders of the key alone."""
        found: dict[int, None] = {}
        for number in range(8 * CANDIDATES):
            word = _hmac(self.key, b"port", self.name.encode(), number.to_bytes(4, "big"))
            found[self.ports[int.from_bytes(word[:8], "big") % len(self.ports)]] = None
        return [port for port in found if port != self.spared or len(found) == 1][:CANDIDATES]

    def proof(self, side: bytes, port: int, nonces: bytes) -> bytes:
        """Return what shows that a side ("client", "server") holds the key."""
        return _hmac(self.key, side, self.name.encode(), port.to_bytes(4, "big"), nonces)


_VARIABLE = "AFTEROK_MEETING"


def to_environment(meeting: Meeting, port: int) -> dict[str, str]:
    """Return the variable by which `of_environment` finds a store again, for this process and its children alone."""
    key = {"key_file": meeting.key_file} if meeting.key_file else {"key": meeting.key.hex()}
    return {_VARIABLE: json.dumps({"address": meeting.address, "port": port, "name": meeting.name, **key})}


def of_environment(environment: Mapping[str, str], limit_s: float) -> "Client | None":
    """Return a connection to the store that this process's environment names; None where it names none. Raise
    UserMistake where it is not what `to_environment` wrote."""
    if _VARIABLE not in environment:
        return None
    try:
        told = json.loads(environment[_VARIABLE])
        key = Path(told["key_file"]).read_text() if "key_file" in told else told["key"]
        ports = range(told["port"], told["port"] + 1)
        meeting = Meeting(told["address"], ports, told["name"], bytes.fromhex(key.strip()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserMistake(f"variable {_VARIABLE}: no meeting of ranks ({why:.80}); afterok sets it: unset it") from None
    return Client(meeting, limit_s, told["port"])


def _hmac(key: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, b"".join(struct.pack("!I", len(part)) + part for part in parts), hashlib.sha256).digest()


def pack_fields(fields: Sequence[bytes]) -> bytes:
    """Return one message: its length, then each field with its own."""
    body = b"".join(struct.pack("!I", len(item)) + item for item in fields)
    return struct.pack("!I", len(body)) + body


def unpack_fields(body: bytes) -> list[bytes]:
    """Return the fields of a message. Raise ValueError."""
    fields, at = [], 0
    while at < len(body):
        size = int.from_bytes(body[at : at + 4], "big")
        if at + 4 + size > len(body):
            raise ValueError("a field is longer than its message")
        fields.append(body[at + 4 : at + 4 + size])
        at += 4 + size
    return fields


class Client:
    """Represents one rank's connection, which has one request at a time, whatever its threads ask."""

    def __init__(self, meeting: Meeting, limit_s: float, port: int | None = None):
        """Connect, to `port` where it is known. Raise MeetingFailed after `limit_s` seconds."""
        self.meeting, self.limit_s = meeting, limit_s
        self._lock = threading.Lock()
        self._socket, self.port = self._connect([port] if port else meeting.candidates())

    def again(self) -> "Client":
        """Return a second connection to the same store."""
        return Client(self.meeting, self.limit_s, self.port)

    def close(self) -> None:
        self._socket.close()

    def _connect(self, ports: list[int]) -> tuple[socket.socket, int]:
        end, patience_s = time.monotonic() + self.limit_s, 1.0
        while True:
            for port in ports:
                try:
                    return self._proven(port, patience_s), port
                except OSError as error:
                    if time.monotonic() > end:
                        raise MeetingFailed(
                            f"rank 0 was not reached at {self.meeting.address} within {self.limit_s:g} s: {error}"
                        ) from None
            time.sleep(0.05)
            patience_s = min(PROOF_S, patience_s * 1.5)

    def _proven(self, port: int, patience_s: float) -> socket.socket:
        connection = socket.create_connection((self.meeting.address, port), timeout=patience_s)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            theirs, mine = _receive(connection, NONCE), os.urandom(NONCE)
            nonces = theirs + mine
            connection.sendall(mine + self.meeting.proof(b"client", port, nonces))
            proof = _receive(connection, NONCE)
            if not hmac.compare_digest(proof, self.meeting.proof(b"server", port, nonces)):
                raise ConnectionError("a stranger")
            return connection
        except BaseException:
            connection.close()
            raise

    def _ask(self, limit_s: float | None, *request: bytes) -> list[bytes]:
        limit_s = self.limit_s if limit_s is None else limit_s
        with self._lock:
            try:
                self._socket.settimeout(limit_s + MARGIN_S)
                self._socket.sendall(pack_fields(request))
                size = int.from_bytes(_receive(self._socket, 4), "big")
                word, *answer = unpack_fields(_receive(self._socket, size))
            except (OSError, ValueError) as error:
                self.close()
                raise MeetingFailed(f"rank 0 at {self.meeting.address}:{self.port} left: {error}") from None
            except BaseException:  # interrupted: the answer, when it comes, must not be taken for the next one's
                self.close()
                raise
        if word == b"late":
            missing = b", ".join(answer).decode(errors="replace")
            raise MeetingTimeout(f"nobody set {missing} within {limit_s:g} s")
        return answer

    def set(self, key: str, value: bytes) -> None:
        self.multi_set([key], [value])

    def multi_set(self, keys: Iterable[str], values: Iterable[bytes]) -> None:
        self._ask(None, b"set", *(word for key, value in zip(keys, values) for word in (key.encode(), bytes(value))))

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Iterable[str]) -> list[bytes]:
        """Return the values once all are there. Raise MeetingTimeout."""
        return self._ask(None, b"get", b"%r" % self.limit_s, *(key.encode() for key in keys))

    def wait(self, keys: Iterable[str], limit_s: float | None = None) -> None:
        """Wait until all keys are set. Raise MeetingTimeout."""
        limit_s = self.limit_s if limit_s is None else limit_s
        self._ask(limit_s, b"wait", b"%r" % limit_s, *(key.encode() for key in keys))

    def check(self, keys: Iterable[str]) -> bool:
        return self._ask(None, b"check", *(key.encode() for key in keys)) == [b"1"]

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(None, b"add", key.encode(), b"%d" % amount)[0])

    def append(self, key: str, more: bytes) -> None:
        self._ask(None, b"append", key.encode(), bytes(more))

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        return self._ask(None, b"compare_set", key.encode(), bytes(expected), bytes(desired))[0]

    def delete(self, key: str) -> bool:
        return self._ask(None, b"delete", key.encode()) == [b"1"]

    def count(self) -> int:
        return int(self._ask(None, b"count")[0])


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = connection.recv(min(size - len(data), 1 << 20))
        if not more:
            raise ConnectionError("the connection ended")
        data += more
    return bytes(data)
