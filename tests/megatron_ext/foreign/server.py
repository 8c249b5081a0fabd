"""A server on 127.0.0.1 that speaks OpenAI's API, and misbehaves when a test asks it to."""

import contextlib
import hashlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = tuple[int, dict[str, str], Any]  # status, headers, body: a mapping (JSON), or a text as it stands
CUT, SILENT = "cut", "silent"  # faults: the connection ends in the middle of an answer, or nothing is ever said


def usage(text: str) -> dict[str, int]:
    """Counts of a server whose tokens are words."""
    return {"prompt_tokens": 3, "completion_tokens": max(len(text.split()), 1), "total_tokens": 4}


def words(asked: dict[str, Any]) -> str:
    """An answer that depends on the prompt and the seed alone."""
    prompt = asked["messages"][-1]["content"] if "messages" in asked else asked["prompt"]
    digest = hashlib.sha256(f"{prompt}/{asked.get('seed') if asked.get('temperature') else ''}".encode()).hexdigest()
    return f"said {digest[:6]}"


@dataclass
class Server:
    """What it answers, and what it was asked: bodies of requests, and their headers."""

    url: str = ""
    models: list[str] | None = field(default_factory=lambda: ["judge", "teacher-7b"])
    answer: Callable[[dict[str, Any]], str | dict[str, Any]] = words  # text, a message, or with "choices" a whole body
    key: str = ""
    faults: list[Fault | str] = field(default_factory=list)  # of the next requests, one each
    tls: ssl.SSLContext | None = None
    wait_s: float = 0.0  # that each answer takes
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    under_way: int = 0
    most_under_way: int = 0

    def body(self, asked: dict[str, Any], chat: bool) -> dict[str, Any]:
        """The answer to a request, as its API spells it."""
        said = self.answer(asked)
        if isinstance(said, dict) and "choices" in said:
            return said
        text = said if isinstance(said, str) else said.get("content") or ""
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if chat:
            choice["message"] = said if isinstance(said, dict) else {"role": "assistant", "content": said}
        else:
            choice["text"] = text
        return {
            "id": "a",
            "object": "chat.completion" if chat else "text_completion",
            "model": asked["model"],
            "system_fingerprint": "fp_1",
            "choices": [choice],
            "usage": usage(text),
        }


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """Run a server in a thread meanwhile."""
    server = Server(**settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self._refused():
                return
            if not self.path.endswith("/models") or server.models is None:
                return self._send(404, {}, {"error": {"message": "no such page"}})
            self._send(200, {}, {"object": "list", "data": [{"id": name} for name in server.models]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.asked.append(asked)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                fault = server.faults.pop(0) if server.faults else None
                server.under_way += 1
                server.most_under_way = max(server.most_under_way, server.under_way)
            try:
                self._answer(asked, fault)
            finally:
                with server.lock:
                    server.under_way -= 1

        def _answer(self, asked: dict[str, Any], fault: Any) -> None:
            time.sleep(server.wait_s)
            if fault == SILENT:
                time.sleep(30)
            elif fault == CUT:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{")
                self.close_connection = True
            elif fault:
                self._send(*fault)
            elif not self._refused():
                self._send(200, {}, server.body(asked, "chat" in self.path))

        def _refused(self) -> bool:
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                said = f"Incorrect API key provided: {self.headers.get('Authorization', '').removeprefix('Bearer ')}"
                self._send(401, {}, {"error": {"message": said}})
                return True
            return False

        def _send(self, status: int, headers: dict[str, str], body: Any) -> None:
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            with contextlib.suppress(OSError):  # who asked has gone
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    if server.tls:
        httpd.socket = server.tls.wrap_socket(httpd.socket, server_side=True)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    server.url = f"http{'s' if server.tls else ''}://127.0.0.1:{httpd.server_address[1]}/v1"
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


@contextlib.contextmanager
def dripping(begun: str) -> Iterator[Server]:
    """Run a server that begins an answer with a text, and goes on by a letter every 50 ms, for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        over = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(begun.encode())
                    while not over.wait(0.05):
                        connection.sendall(b"x")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        try:
            yield Server(url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1")
        finally:
            over.set()
            thread.join()
