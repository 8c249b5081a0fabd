"""Verifiers of users, good and bad: what the Scorer's processes import."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass

import numpy as np

from data_tools.tasks.task import Item


def apart(item, completion):
    """Score any two texts differently, so that no group of different samples has equal rewards."""
    return zlib.crc32(completion.encode()) / 2**32


def length(item, completion):
    return len(completion)


def misbehave(item, completion):
    """As the completion says."""
    if completion == "raise":
        raise ValueError("no such answer")
    if completion == "exit":
        sys.exit(3)
    if completion == "sleep":
        time.sleep(3600)
    if completion == "spin":  # in C, with the interpreter's lock held
        re.match(r"(a+)+$", "a" * 40 + "b")
    if completion == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "ignore":
        os._exit(0)
    values = {"nan": float("nan"), "inf": float("inf"), "text": "0.5", "three": [1.0, 0.0, 1.0], "nothing": None,
              "nan term": {"a": 1.0, "b": float("nan")}, "text term": {"a": "1"}, "no terms": {},
              "numpy": np.float32(0.5),
              "terms": {"a": 1, "b": 0.5, "c": None}, "true": True}  # fmt: skip
    return values.get(completion, 1.0)


class Evil:
    """What runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ['TMPDIR']}/unpickled",)


def forge(completion):
    """Write something of its own to every descriptor, as the verifiers' answer."""
    forged = json.dumps({"reward": 1.0, "parts": {}, "note": "", "answer": None}).encode()
    sent = {"half an answer": b"\0\0\x10\0abc", "a pickle": pickle.dumps(Evil()),
            "an answer of before": len(forged).to_bytes(4, "big") + forged}[completion]  # fmt: skip
    for handle in [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]:
        try:
            os.write(handle, sent)
        except OSError:
            continue
    if completion == "half an answer":
        time.sleep(3600)


def leave_a_child(completion):
    """Start a process that outlives its parent, and then do as the completion says."""
    child = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    with open(f"{os.environ['TMPDIR']}/left", "a") as file:
        print(child.pid, file=file)
    if completion.endswith("its supervisor"):
        os.kill(os.getppid(), signal.SIGSTOP if "stops" in completion else signal.SIGKILL)
    if completion in ("leaves and hangs", "leaves and stops its supervisor", "leaves and kills its supervisor"):
        time.sleep(3600)
    if completion == "leaves and dies":
        os._exit(1)


def hostile(item, completion):
    """As the completion says."""
    if completion == "closes":
        os.closerange(3, 1024)
        time.sleep(3600)
    if completion in ("half an answer", "a pickle", "an answer of before"):
        forge(completion)
    if completion.startswith("leaves"):
        leave_a_child(completion)
    if completion == "a huge number":
        frame = sys._getframe()
        while "connection" not in frame.f_locals:
            frame = frame.f_back
        answer = b'{"reward": 1%s, "parts": {}, "note": "", "answer": null}' % (b"0" * 400)
        frame.f_locals["connection"].sendall(frame.f_locals["token"] + len(answer).to_bytes(4, "big") + answer)
        time.sleep(3600)
    if completion == "sockets of a command":
        return float(os.popen("readlink /proc/self/fd/* | grep -c socket:").read())
    if completion == "takes memory":
        return float(len(bytearray(64 << 30)))
    if completion == "long":
        return {"x" * (5 << 20): 1.0}
    if completion == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if completion == "looks":
        return {name: float(name in os.environ) for name in ("A_SECRET", "NAMED", "PATH")}
    return 1.0


def needs_a_file(item, completion):
    """Scores while the file that its row names is there."""
    open(item.columns["file"]).close()
    return 1.0


def torch_imported(item, completion):
    return float("torch" in sys.modules)


# ---- a task of several turns -----------------------------------------------------------------------------------------

HUB, REWARDS, RIGHT = "", {}, 1.0


@dataclass
class Options:
    every: bool = True


def items(record, options):
    return [Item.of(record["prompt"], None, record)]


def rewards(item, completion, options):
    return float(len(completion))


def stop_strings(options):
    return ["1", "2", "3", "4", "5", "6", "7", "8", "9"] if options.every else None


def reply(item, transcript, options):
    """What the transcript asks for; else how long it is, where that is an odd number."""
    if transcript == "raise":
        raise ValueError("no such tool")
    if transcript in ("sleep", "die"):
        misbehave(item, transcript)
    odd = {"number": 3, "huge": "x" * (2 << 20), "half": "\ud800", "over": None, "how long?": "9 letters"}
    return odd[transcript] if transcript in odd else f"{len(transcript)}" if len(transcript) % 2 else ""
