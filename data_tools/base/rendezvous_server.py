"""The side of rank 0 in rendezvous.py: the store of keys and values, which serves whoever proves that he holds the
key."""

import contextlib
import errno
import hmac
import os
import resource
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field

from data_tools.base.rendezvous import LONGEST, NONCE, PROOF_S, Meeting, MeetingFailed, pack_fields, unpack_fields

UNPROVEN = 128  # connections that have not proven themselves, at once; the oldest makes room
TICK_S = 0.2  # how late a time limit may be noticed


class Server:
    """Holds the store itself, in a thread of rank 0 that ends with the process or with `close`."""

    def __init__(self, meeting: Meeting):
        """Listen at the first of the meeting's ports that is free. Raise MeetingFailed."""
        self.meeting = meeting
        self.values: dict[bytes, bytes] = {}
        self._socket = _listen(meeting)
        self._socket.setblocking(False)
        self.port = self._socket.getsockname()[1]
        self._peers = selectors.DefaultSelector()
        self._peers.register(self._socket, selectors.EVENT_READ)
        self._unproven: dict[_Peer, None] = {}
        self._waiting: dict[_Wait, None] = {}
        self._missed: dict[bytes, dict[_Wait, None]] = {}  # key -> who waits for it: thousands wait at once
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
            for peer in [key.data for key in self._peers.get_map().values() if key.data is not None]:
                peer.socket.close()
            self._socket.close()
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
            self._answer(peer, unpack_fields(body))

    def _answer(self, peer: "_Peer", request: list[bytes]) -> None:
        word, *rest = request
        getattr(self, f"_do_{word.decode('ascii')}")(peer, *rest)

    def _say(self, peer: "_Peer", *fields: bytes) -> None:
        """Send what the connection takes at once: an answer must not wait for a process that may end now."""
        peer.out += pack_fields(fields)
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
        for key in values:
            for wait in list(self._missed.pop(key, ())):
                wait.missing.discard(key)
                if not wait.missing and wait in self._waiting:
                    self._forget(wait)
                    self._say(wait.peer, b"ok", *self._values_of(wait.wanted))

    def _when_set(self, peer: "_Peer", limit_s: bytes, keys: list[bytes], wanted: list[bytes]) -> None:
        missing = {key for key in keys if key not in self.values}
        if missing:
            wait = _Wait(time.monotonic() + float(limit_s), missing, peer, wanted)
            self._waiting[wait] = peer.waits[wait] = None
            for key in missing:
                self._missed.setdefault(key, {})[wait] = None
        else:
            self._say(peer, b"ok", *self._values_of(wanted))

    def _forget(self, wait: "_Wait") -> None:
        """Stop waiting for what a request asked, if it still does."""
        self._waiting.pop(wait, None)
        wait.peer.waits.pop(wait, None)
        for key in wait.missing & self._missed.keys():
            self._missed[key].pop(wait, None)
            if not self._missed[key]:
                del self._missed[key]

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
            if key in wait.wanted:  # it is to be set again before that one is answered
                wait.missing.add(key)
                self._missed.setdefault(key, {})[wait] = None
        self._say(peer, b"ok", b"0" if self.values.pop(key, None) is None else b"1")

    def _do_count(self, peer: "_Peer") -> None:
        self._say(peer, b"ok", b"%d" % len(self.values))

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for peer in [peer for peer in self._unproven if now > peer.since + PROOF_S]:
            self._drop(peer)
        late = [wait for wait in self._waiting if now > wait.until]
        for wait in late:
            self._forget(wait)
            self._say(wait.peer, b"late", *sorted(wait.missing)[:3])

    def _drop(self, peer: "_Peer") -> None:
        if not peer.gone:
            peer.gone = True
            with contextlib.suppress(KeyError):
                self._peers.unregister(peer.socket)
            peer.socket.close()
            self._unproven.pop(peer, None)
            for wait in list(peer.waits):
                self._forget(wait)


@dataclass(eq=False)
class _Peer:
    """Represents one connection as the server sees it."""

    socket: socket.socket
    nonce: bytes
    received: bytearray = field(default_factory=bytearray)
    out: bytearray = field(default_factory=bytearray)
    proven: bool = False
    gone: bool = False
    since: float = field(default_factory=time.monotonic)
    waits: "dict[_Wait, None]" = field(default_factory=dict)


@dataclass(eq=False)
class _Wait:
    """Represents a request that is answered, with the values of the `wanted` keys, once its keys are set."""

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
