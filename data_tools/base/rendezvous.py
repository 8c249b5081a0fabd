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

import contextlib
import errno
import hashlib
import hmac
import json
import os
import resource
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NONCE = 32  # bytes, and those of an HMAC-SHA256
PROOF_S = 5.0  # to prove oneself in
UNPROVEN = 128  # connections that have not proven themselves, at once; the oldest makes room
LONGEST = 1 << 28  # bytes of a request or an answer
CANDIDATES = 64  # ports
TICK_S = 0.2  # how late a time limit may be noticed
MARGIN_S = 30.0  # from the server's time limit to the client's own


class MeetingFailed(ConnectionError):
    """Raised when the others cannot be reached, or left."""


class MeetingTimeout(TimeoutError):
    """Raised when a key was not set in time."""


@dataclass(frozen=True)
class Meeting:
    """Where ranks meet (an IPv4 or IPv6 address and ports to choose from), under which name, with which key."""

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
    """Return a connection to the store that this process's environment names; None where it names none."""
    if _VARIABLE not in environment:
        return None
    told = json.loads(environment[_VARIABLE])
    key = Path(told["key_file"]).read_text() if "key_file" in told else told["key"]
    meeting = Meeting(told["address"], range(told["port"], told["port"] + 1), told["name"], bytes.fromhex(key.strip()))
    return Client(meeting, limit_s, told["port"])


def _hmac(key: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, b"".join(struct.pack("!I", len(part)) + part for part in parts), hashlib.sha256).digest()


def _pack(fields: Sequence[bytes]) -> bytes:
    """Return one message: its length, then each field with its own."""
    body = b"".join(struct.pack("!I", len(item)) + item for item in fields)
    return struct.pack("!I", len(body)) + body


def _unpack(body: bytes) -> list[bytes]:
    """Return the fields of a message. Raises ValueError."""
    fields, at = [], 0
    while at < len(body):
        size = int.from_bytes(body[at : at + 4], "big")
        if at + 4 + size > len(body):
            raise ValueError("a field is longer than its message")
        fields.append(body[at + 4 : at + 4 + size])
        at += 4 + size
    return fields


# -- the server ---------------------------------------------------------------------------------------------------


class Server:
    """The store itself, in a thread of rank 0 that ends with the process or with `close`."""

    def __init__(self, meeting: Meeting):
        """Listen at the first of the meeting's ports that is free. Raises MeetingFailed."""
        self.meeting, self.values = meeting, {}
        self._socket = _listen(meeting)
        self._socket.setblocking(False)
        self.port = self._socket.getsockname()[1]
        self._peers = selectors.DefaultSelector()
        self._peers.register(self._socket, selectors.EVENT_READ)
        self._unproven: dict[_Peer, None] = {}
        self._waiting: list[_Wait] = []
        self._ended = False
        self._thread = threading.Thread(target=self._serve, daemon=True, name="rendezvous")
        self._thread.start()

    def close(self) -> None:
        """Stop serving; connections end."""
        self._ended = True
        self._thread.join()

    def _serve(self) -> None:
        try:
            while not self._ended:
                for key, events in self._peers.select(TICK_S):
                    if key.data is None:
                        self._accept()
                    else:
                        self._exchange(key.data, events)
                self._look_at_the_clock()
        finally:  # those who wait hear of it
            for key in list(self._peers.get_map().values()):
                key.fileobj.close()
            self._peers.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:  # it left already, or no descriptor is free: those that prove nothing make room
            if self._unproven:
                self._drop(next(iter(self._unproven)))
            elif error.errno in (errno.EMFILE, errno.ENFILE) and not _more_descriptors():
                time.sleep(TICK_S / 10)  # the others are served meanwhile, without a busy loop
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = _Peer(connection, os.urandom(NONCE))
        peer.out += peer.nonce
        self._unproven[peer] = None
        if len(self._unproven) > UNPROVEN:
            self._drop(next(iter(self._unproven)))
        self._peers.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE, peer)

    def _exchange(self, peer: "_Peer", events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                data = peer.socket.recv(1 << 16)
                if not data:
                    return self._drop(peer)
                peer.received += data
                self._read(peer)
            if peer.out:
                del peer.out[: peer.socket.send(peer.out)]
        except BlockingIOError:
            pass
        except Exception:  # a stranger, somebody who left, or no request: the others' store goes on
            return self._drop(peer)
        self._watch(peer)

    def _watch(self, peer: "_Peer") -> None:
        if not peer.gone:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.out else 0)
            self._peers.modify(peer.socket, wanted, peer)

    def _read(self, peer: "_Peer") -> None:
        """Take what came: a proof first, then requests."""
        if not peer.proven:
            if len(peer.received) < 2 * NONCE:
                return
            theirs, proof = bytes(peer.received[:NONCE]), bytes(peer.received[NONCE : 2 * NONCE])
            nonces = peer.nonce + theirs
            if not hmac.compare_digest(proof, self.meeting.proof(b"client", self.port, nonces)):
                raise ValueError("a stranger")
            del peer.received[: 2 * NONCE]
            peer.proven = True
            del self._unproven[peer]
            peer.out += self.meeting.proof(b"server", self.port, nonces)
        while len(peer.received) >= 4:
            size = int.from_bytes(peer.received[:4], "big")
            if size > LONGEST:
                raise ValueError(f"a request of {size} bytes")
            if len(peer.received) < 4 + size:
                return
            body = bytes(peer.received[4 : 4 + size])
            del peer.received[: 4 + size]
            self._answer(peer, _unpack(body))

    def _answer(self, peer: "_Peer", request: list[bytes]) -> None:
        word, *rest = request
        getattr(self, f"_do_{word.decode('ascii')}")(peer, *rest)

    def _say(self, peer: "_Peer", *fields: bytes) -> None:
        """Send what the connection takes at once: an answer must not wait for a process that may end now."""
        peer.out += _pack(fields)
        try:
            del peer.out[: peer.socket.send(peer.out)]
        except BlockingIOError:
            pass
        except OSError:
            return self._drop(peer)
        self._watch(peer)

    def _put(self, peer: "_Peer", values: dict[bytes, bytes], *answer: bytes) -> None:
        """Set values and say so, first to the one who set them: those who waited may end the store."""
        self.values.update(values)
        self._say(peer, b"ok", *answer)
        for wait in [wait for wait in self._waiting if wait.missing & values.keys()]:
            wait.missing -= values.keys()
            if not wait.missing and wait in self._waiting:
                self._waiting.remove(wait)
                self._say(wait.peer, b"ok", *self._values_of(wait.wanted))

    def _when_set(self, peer: "_Peer", limit_s: bytes, keys: list[bytes], wanted: list[bytes]) -> None:
        missing = {key for key in keys if key not in self.values}
        if missing:
            self._waiting.append(_Wait(time.monotonic() + float(limit_s), missing, peer, wanted))
        else:
            self._say(peer, b"ok", *self._values_of(wanted))

    def _values_of(self, keys: list[bytes]) -> list[bytes]:
        return [self.values[key] for key in keys]

    def _do_set(self, peer: "_Peer", *pairs: bytes) -> None:
        self._put(peer, dict(zip(pairs[::2], pairs[1::2], strict=True)))

    def _do_get(self, peer: "_Peer", limit_s: bytes, *keys: bytes) -> None:
        self._when_set(peer, limit_s, list(keys), list(keys))

    def _do_wait(self, peer: "_Peer", limit_s: bytes, *keys: bytes) -> None:
        self._when_set(peer, limit_s, list(keys), [])

    def _do_check(self, peer: "_Peer", *keys: bytes) -> None:
        self._say(peer, b"ok", b"1" if all(key in self.values for key in keys) else b"0")

    def _do_add(self, peer: "_Peer", key: bytes, amount: bytes) -> None:
        total = b"%d" % (int(self.values.get(key, b"0")) + int(amount))
        self._put(peer, {key: total}, total)

    def _do_append(self, peer: "_Peer", key: bytes, more: bytes) -> None:
        self._put(peer, {key: self.values.get(key, b"") + more})

    def _do_compare_set(self, peer: "_Peer", key: bytes, expected: bytes, desired: bytes) -> None:
        """Set where the value is the expected one, or where there is none and none is expected; as TCPStore does."""
        before = self.values.get(key)
        if before == expected or (before is None and not expected):
            return self._put(peer, {key: desired}, desired)
        self._say(peer, b"ok", expected if before is None else before)

    def _do_delete(self, peer: "_Peer", key: bytes) -> None:
        for wait in self._waiting:
            wait.missing |= {key} & set(wait.wanted)  # it is to be set again before that one is answered
        self._say(peer, b"ok", b"0" if self.values.pop(key, None) is None else b"1")

    def _do_count(self, peer: "_Peer") -> None:
        self._say(peer, b"ok", b"%d" % len(self.values))

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for peer in [peer for peer in self._unproven if now > peer.since + PROOF_S]:
            self._drop(peer)
        late = [wait for wait in self._waiting if now > wait.until]
        self._waiting = [wait for wait in self._waiting if now <= wait.until]
        for wait in late:
            self._say(wait.peer, b"late", *sorted(wait.missing)[:3])

    def _drop(self, peer: "_Peer") -> None:
        if not peer.gone:
            peer.gone = True
            with contextlib.suppress(KeyError):
                self._peers.unregister(peer.socket)
            peer.socket.close()
            self._unproven.pop(peer, None)
            self._waiting = [wait for wait in self._waiting if wait.peer is not peer]


@dataclass(eq=False)
class _Peer:
    """One connection as the server sees it."""

    socket: socket.socket
    nonce: bytes
    received: bytearray = field(default_factory=bytearray)
    out: bytearray = field(default_factory=bytearray)
    proven: bool = False
    gone: bool = False
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Wait:
    """A request that is answered, with the values of the `wanted` keys, once its keys are set."""

    until: float
    missing: set[bytes]
    peer: _Peer
    wanted: list[bytes]


def _more_descriptors() -> bool:
    """Raise this process's limit of open files as far as the site lets it; return whether there was room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] > soft


def _listen(meeting: Meeting) -> socket.socket:
    """Return a socket that listens at the meeting's address, or at every one where that is not this host's own."""
    try:
        family, _, _, _, place = socket.getaddrinfo(meeting.address, 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise MeetingFailed(f"{meeting.address}, where the ranks are to meet, is no address: {error}") from None
    for address in (place[0], ""):
        for port in meeting.candidates():
            listening = socket.socket(family, socket.SOCK_STREAM)
            try:
                listening.bind((address, port, *place[2:]))
                listening.listen(1024)
                return listening
            except OSError as error:
                listening.close()
                if error.errno == errno.EADDRNOTAVAIL:  # behind a translation of addresses
                    break
    raise MeetingFailed(
        f"none of {len(meeting.candidates())} ports from {meeting.ports[0]} to {meeting.ports[-1]} of "
        f"{meeting.address} is free"
    )


# -- the client ---------------------------------------------------------------------------------------------------


class Client:
    """One rank's connection; one request at a time, whatever its threads ask. `limit_s`: for what does not say."""

    def __init__(self, meeting: Meeting, limit_s: float, port: int | None = None):
        """Connect, to `port` where it is known. Raises MeetingFailed after `limit_s` seconds."""
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
                self._socket.sendall(_pack(request))
                size = int.from_bytes(_receive(self._socket, 4), "big")
                word, *answer = _unpack(_receive(self._socket, size))
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
        """Return the values once all are there. Raises MeetingTimeout."""
        return self._ask(None, b"get", b"%r" % self.limit_s, *(key.encode() for key in keys))

    def wait(self, keys: Iterable[str], limit_s: float | None = None) -> None:
        """Wait until all keys are set. Raises MeetingTimeout."""
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
