"""Ranks meet in a store that nobody enters without the key, whatever he knows of address, port and protocol."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from data_tools.base import rendezvous
from data_tools.base.ports import PORTS
from data_tools.base.rendezvous import NONCE, Client, Meeting, MeetingFailed, MeetingTimeout
from data_tools.base.rendezvous_server import UNPROVEN, Server
from data_tools.mistake import UserMistake
from tests.command import ROOT, wait_for

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
        told = b""
        try:
            stranger.sendall(sent)
            while data := stranger.recv(1 << 16):
                told += data
        except (ConnectionResetError, BrokenPipeError):
            pass
        return told


STRANGERS = {
    "zeros": b"\0" * 64, "a request": b"\0" * 64 + rendezvous.pack_fields([b"get", b"1", b"secret"]),
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
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(UNPROVEN + 30)]
    late = Client(server.meeting, 20.0)
    client.set("a", b"1")
    assert late.get("a") == b"1" and len(server._unproven) <= UNPROVEN
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
    meeting, taken = place(request.node.name), []
    for port in meeting.candidates()[:2]:
        with contextlib.suppress(OSError):  # taken already, by somebody else
            taken.append(socket.create_server(("127.0.0.1", port)))
    server = Server(meeting)
    assert server.port in meeting.candidates()[2:]
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
    code = (
        "import os, encodings.idna; from data_tools.base.rendezvous import Client, Meeting, MeetingFailed\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"place = Meeting('127.0.0.1', range({server.port}, {server.port + 1}), {server.meeting.name!r}, b'guess')\n"
        "try: Client(place, 0.3); print('IN')\n"
        "except MeetingFailed: print('out')\n"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == "out\n", said
    assert client.get("afterok/secrets") == b"value"


def test_a_value_that_is_deleted_amid_a_wait_is_waited_for_again(store):
    server, one = store
    other, heard = Client(server.meeting, 20.0), []
    one.set("early", b"1")
    waiting = threading.Thread(target=lambda: heard.append(other.multi_get(["early", "late"])))
    waiting.start()
    wait_for("the request", lambda: server._waiting)
    assert one.delete("early")
    one.set("late", b"2")
    one.set("early", b"3")
    waiting.join(20)
    assert heard == [[b"3", b"2"]]


class Untouched(set):
    """What a request misses, and how often the server looked at it."""

    looks = 0

    def __and__(self, others):
        Untouched.looks += 1
        return super().__and__(others)

    def discard(self, key):
        Untouched.looks += 1
        super().discard(key)


def test_a_value_costs_those_who_wait_for_another_nothing(store):
    """Thousands of ranks wait for the last word while each says that it is done."""
    server, one = store
    others, heard = [Client(server.meeting, 20.0) for _ in range(3)], []
    waiting = [threading.Thread(target=lambda c=client: heard.append(c.get("sealed"))) for client in others]
    for thread in waiting:
        thread.start()
    wait_for("the requests", lambda: len(server._waiting) == 3)
    for wait in server._waiting:
        wait.missing = Untouched(wait.missing)
    for number in range(10):
        one.set(f"done/{number}", b"")
    assert Untouched.looks == 0
    one.set("sealed", b"1")
    for thread in waiting:
        thread.join(20)
    assert heard == [b"1"] * 3 and not server._waiting and not server._missed


@pytest.mark.parametrize("ended_by", ["a time limit", "an exception"])
def test_an_answer_that_came_too_late_is_not_taken_for_the_next_one(store, ended_by, monkeypatch):
    """A connection whose request was given up is given up with it."""
    server, client = store
    client.set("q", b"the next one's")
    hasty = Client(server.meeting, 20.0)
    hasty.limit_s = 0.1  # of what it asks, once it is connected
    if ended_by == "a time limit":  # of the client's own, as where rank 0 is stopped
        monkeypatch.setattr(rendezvous, "MARGIN_S", -0.05)
        with pytest.raises(MeetingFailed):
            hasty.get("late")
    else:
        monkeypatch.setattr(rendezvous, "_receive", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            hasty.get("late")
    monkeypatch.undo()
    client.set("late", b"the first one's")
    with pytest.raises(MeetingFailed):
        hasty.get("q")


def test_the_port_that_was_promised_to_somebody_else_is_left_to_him(request):
    meeting = place(request.node.name)
    first = meeting.candidates()[0]
    assert replace(meeting, spared=first).candidates()[0] == meeting.candidates()[1]
    assert replace(meeting, ports=range(first, first + 2), spared=first).candidates() == [first + 1]
    assert replace(meeting, ports=range(first, first + 1), spared=first).candidates() == [first]


@pytest.mark.parametrize("address, own", [("localhost", True), ("::1", True), ("203.0.113.9", False)])
def test_names_and_addresses_of_both_kinds_serve_also_behind_a_translation(request, address, own):
    server = Server(replace(place(request.node.name), address=address))
    reached = server._socket.getsockname()[0]
    assert reached in (("127.0.0.1", "::1") if own else ("0.0.0.0",))
    client = Client(server.meeting if own else replace(server.meeting, address="127.0.0.1"), 20.0)
    client.set("a", b"1")
    client.close()
    server.close()


def test_an_address_that_is_none_is_said_at_once(request):
    with pytest.raises(MeetingFailed, match="no.such.host.invalid, where the ranks are to meet, is no address"):
        Server(replace(place(request.node.name), address="no.such.host.invalid"))


def test_more_ranks_than_the_soft_limit_of_open_files_are_let_in():
    """Rank 0 of a large job holds one connection for each rank, and torch's as well."""
    code = (
        "import os, resource; from data_tools.base.rendezvous import Client, Meeting\n"
        "from data_tools.base.rendezvous_server import Server\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))\n"
        "server = Server(Meeting('127.0.0.1', range(20000, 30000), f'many/{os.getpid()}', b'k' * 32))\n"
        "held = [os.dup(0) for _ in range(20)]\n"
        "if not os.fork():\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))\n"
        "    every = [Client(server.meeting, 20.0, server.port) for _ in range(60)]\n"
        "    for one in every: one.add('n', 1)\n"
        "    os._exit(every[0].get('n') != b'60')\n"
        "os._exit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done


@pytest.mark.parametrize("text", [
    "", "x", "[]", "null", "{}", '{"key": 1}', '{"key_file": "/nonexistent", "address": "", "port": 1, "name": ""}',
    '{"key": "zz", "address": "", "port": 1, "name": ""}', '{"key": "00", "address": "", "port": "x", "name": ""}',
    "[" * 100_000,
])  # fmt: skip
def test_a_meeting_that_is_none_is_a_mistake(text):
    with pytest.raises(UserMistake, match="AFTEROK_MEETING: no meeting of ranks"):
        rendezvous.of_environment({"AFTEROK_MEETING": text}, 1.0)
