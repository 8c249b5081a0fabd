"""Masks a rank's secrets in everything that it and its children write to stdout and stderr, native code included.

    a rank, libraries, children ── two pipes ── python -m jobs.masking ── the log

The filter is a process of its own, so that a rank which crashes has its last words written all the same. It is told the
values through its standard input, heeds no signal, and ends with the last writer.
"""

import atexit
import json
import os
import re
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterable

STREAMS = (1, 2)
READ_BYTES = 1 << 16
LAST_WORDS_S = 5.0  # how long a rank that ends waits for the filter; a child that lives on keeps the filter alive


class Masker:
    """Replaces texts by their names in a stream that comes in pieces; what may begin a text waits for the rest."""

    def __init__(self, names: dict[bytes, bytes]):
        """Mask each text of `names` by what it names."""
        self.names, self.held = names, b""
        longest_first = sorted(names, key=len, reverse=True)
        self.whole = re.compile(b"|".join(map(re.escape, longest_first)))
        self.longest, self.firsts = len(longest_first[0]), {text[0] for text in names}

    def feed(self, data: bytes, last: bool = False) -> bytes:
        """Return what can be written now: everything once this piece is the `last`."""
        data, out, at = self.held + data, b"", 0
        while True:
            match = self.whole.search(data, at)
            begun = len(data) if last else self._begun(data, at)
            if match is None or begun <= match.start():
                self.held = data[begun:]
                return out + data[at:begun]
            out += data[at : match.start()] + self.names[match[0]]
            at = match.end()

    def _begun(self, data: bytes, at: int) -> int:
        """Return where the end of `data` may be the beginning of a text."""
        for i in range(max(at, len(data) - self.longest + 1), len(data)):
            rest = data[i:]
            if data[i] in self.firsts and any(text.startswith(rest) and text != rest for text in self.names):
                return i
        return len(data)


class MaskedOutput:
    """This process's stdout and stderr, through the filter from now on."""

    def __init__(self, names: Iterable[tuple[str, str]]):
        """Send stdout and stderr through the filter; `names` are pairs (text, what stands for it)."""
        self.before = {stream: os.dup(stream) for stream in STREAMS}
        pipes = {stream: os.pipe() for stream in STREAMS}
        _flush()
        # Held signals are inherited: a step's signals reach the filter too, and must not end it before the rank.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.filter = subprocess.Popen(
                [sys.executable, "-m", "jobs.masking", *(str(pipes[s][0]) for s in STREAMS)],
                stdin=subprocess.PIPE,
                pass_fds=[pipes[s][0] for s in STREAMS],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert self.filter.stdin is not None  # a pipe, as asked for
        with self.filter.stdin as told:
            told.write(json.dumps(list(names)).encode())
        for stream, (read, write) in pipes.items():
            os.dup2(write, stream)
            os.close(read)
            os.close(write)
        atexit.register(self.close)  # so early that what others register then is masked still

    def close(self) -> None:
        """Write unmasked again, once the filter has written what it has; for the end of the process."""
        _flush()
        for stream, before in self.before.items():
            os.dup2(before, stream)
        try:
            self.filter.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            pass


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the log may lie on the disk that is full
            pass


def main(pipes: list[int]) -> None:
    """Copy each pipe to its stream, masked, until the last writer has closed it."""
    names = {text.encode(): name.encode() for text, name in json.load(sys.stdin)}
    streams = selectors.DefaultSelector()
    for pipe, stream in zip(pipes, STREAMS):
        streams.register(pipe, selectors.EVENT_READ, (stream, Masker(names)))
    while streams.get_map():
        for key, _ in streams.select():
            stream, masker = key.data
            data = os.read(key.fd, READ_BYTES)
            _write(stream, masker.feed(data, last=not data))
            if not data:
                streams.unregister(key.fd)


def _write(stream: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(stream, data) :]
    except OSError:  # a full disk or a reader that left: the rank must not wait for it
        pass


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
