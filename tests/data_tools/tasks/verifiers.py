"""Verifiers of users, good and bad: what the Scorer's processes import."""

import os
import re
import signal
import sys
import time

import numpy as np


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
              "nan term": {"a": 1.0, "b": float("nan")}, "text term": {"a": "1"}, "no terms": {}, "numpy": np.float32(0.5),
              "terms": {"a": 1, "b": 0.5, "c": None}, "true": True}  # fmt: skip
    return values.get(completion, 1.0)


def torch_imported(item, completion):
    return float("torch" in sys.modules)
