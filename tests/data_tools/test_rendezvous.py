"""Ranks meet in a store that nobody enters without the key, whatever he knows of address, port and protocol."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from data_tools import rendezvous
from data_tools.ports import PORTS
from data_tools.rendezvous import NONCE, Client, Meeting, MeetingFailed, MeetingTimeout, Server
from tests.command import ROOT

KEY = b"k" * 32


def place(name: str, key: bytes = KEY) -> Meeting:
    return Meeting("127.0.0.1", PORTS, f"{name}/{os.getpid()}", key)


@pytest.fixture
def store(request):
    server = Server(place(request.node.name))
    client = Client(server.meeting, 20.0)
    yield server, client
    client.close()
    server.close()


def test_what_one_sets_another_gets_and_waits_for(store):
    server, one = store
    other = Client(server.meeting, 20.0)
    heard = []
    waiting = threading.Thread(target=lambda: heard.append(other.multi_get(["late", "early"])))
    one.set("early", b"\0\xff")
    waiting.start()
    one.set("late", b"x" * 3_000_000)
    waiting.join(20)
    assert heard == [[b"x" * 3_000_000, b"\0\xff"]]
    assert (one.add("n", 2), other.add("n", 3)) == (2, 5) and other.get("n") == b"5"
    assert one.compare_set("c", b"", b"first") == b"first" == other.compare_set("c", b"", b"second")
    assert other.compare_set("c", b"first", b"third") == b"third" and one.compare_set("none", b"a", b"b") == b"a"
    one.append("early", b"!")
    assert other.get("early") == b"\0\xff!" and other.check(["early", "n"]) and not other.check(["early", "m"])
    assert one.delete("early") and not other.delete("early") and one.count() == 3
    assert one.again().get("n") == b"5"
    with pytest.raises(MeetingTimeout, match="nobody set never within 0.2 s"):
        one.wait(["n", "never"], 0.2)
    other.wait(["n"])


def test_it_listens_on_the_address_that_was_told_and_on_no_other(store):
    server, _ = store
    assert server._socket.getsockname()[0] == "127.0.0.1"


def test_the_ports_that_are_tried_are_known_to_holders_of_the_key_alone():
    mine, others = place("a"), {tuple(place("a", bytes([n] * 32)).candidates()[:4]) for n in range(50)}
    assert len(others) == 50 and mine.candidates() == place("a").candidates() and set(mine.candidates()) <= set(PORTS)
    assert len(mine.candidates()) > 32


@pytest.mark.parametrize("wrong", ["key", "name"])
def test_who_holds_another_key_or_comes_from_another_job_is_not_let_in(store, wrong):
    server, client = store
    key, name = (b"w" * 32, server.meeting.name) if wrong == "key" else (KEY, "another element")
    with pytest.raises(MeetingFailed, match="was not reached at 127.0.0.1 within 0.3 s"):
        Client(Meeting("127.0.0.1", PORTS, name, key), 0.3, server.port)
    client.set("still", b"here")


def attack(server: Server, sent: bytes, after_nonce: bool = True) -> bytes:
    """What a stranger is told beyond the nonce, until he is thrown out."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=rendezvous.PROOF_S + 10) as stranger:
        if after_nonce:
            assert len(stranger.recv(NONCE)) == NONCE
        stranger.sendall(sent)
        told = b""
        try:
            while data := stranger.recv(1 << 16):
                told += data
        except ConnectionResetError:
            pass
        return told


STRANGERS = {
    "zeros": b"\0" * 64, "a request": b"\0" * 64 + rendezvous._pack([b"get", b"1", b"secret"]),
    "torch's TCPStore": b"\x00\xce\xc0\x85\x3c" + b"\0" * 100, "http": b"GET / HTTP/1.1\r\n\r\n" * 10,
    "a megabyte": b"A" * (1 << 20), "the server's own proof": b"S",
}  # fmt: skip


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_learns_nothing_changes_nothing_and_hangs_nobody(store, stranger):
    server, client = store
    client.set("secret", b"value")
    sent = STRANGERS[stranger]
    if sent == b"S":  # without the key the best he has is what he was told himself
        sent = b"\0" * NONCE + server.meeting.proof(b"server", server.port, b"\0" * 2 * NONCE)
    assert attack(server, sent) == b""
    assert client.get("secret") == b"value" and client.count() == 1


def test_strangers_that_say_nothing_do_not_keep_others_out(store):
    server, client = store
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(rendezvous.UNPROVEN + 30)]
    late = Client(server.meeting, 20.0)
    client.set("a", b"1")
    assert late.get("a") == b"1" and len(server._unproven) <= rendezvous.UNPROVEN
    for one in silent:
        one.close()


def test_one_who_passes_a_proof_on_from_another_port_is_not_believed(store):
    """The man in the middle, who took the port that the ranks try first."""
    server, _ = store
    middle = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def relay():
        while not stop.is_set():
            try:
                near, _ = middle.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", server.port))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=pump, args=(source, sink), daemon=True).start()

    def pump(source, sink):
        try:
            while data := source.recv(4096):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    threading.Thread(target=relay, daemon=True).start()
    with pytest.raises(MeetingFailed):
        Client(server.meeting, 0.5, middle.getsockname()[1])
    stop.set()
    middle.close()


def test_a_port_that_a_stranger_took_is_passed_by(request):
    meeting = place(request.node.name)
    taken = [socket.create_server(("127.0.0.1", port)) for port in meeting.candidates()[:2]]
    server = Server(meeting)
    assert server.port == meeting.candidates()[2]
    client = Client(meeting, 30.0)
    client.set("a", b"1")
    client.close()
    server.close()
    for one in taken:
        one.close()


def test_a_request_that_is_none_ends_its_connection_and_nothing_else(store):
    server, client = store
    other = Client(server.meeting, 5.0)
    for request in ([b"no_such_word"], [b"get"], [b"add", b"k", b"not a number"], [b"_set", b"a"], [b""]):
        mine = Client(server.meeting, 5.0)
        with pytest.raises(MeetingFailed):
            mine._ask(None, *request)
            mine._ask(None, b"count")
    assert other.count() == 0 and client.count() == 0


def test_another_user_of_the_machine_gets_nowhere(store):
    """With a second uid and a key of his own; what the store speaks he knows."""
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    server, client = store
    client.set("afterok/secrets", b"value")
    code = ("import os, encodings.idna; from data_tools.rendezvous import Client, Meeting, MeetingFailed\n"
            "os.setgid(65534); os.setuid(65534)\n"
            f"place = Meeting('127.0.0.1', range({server.port}, {server.port + 1}), {server.meeting.name!r}, b'guess')\n"
            "try: Client(place, 0.3); print('IN')\n"
            "except MeetingFailed: print('out')\n")
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == "out\n", said
    assert client.get("afterok/secrets") == b"value"
