"""Randomness by address: a permutation is a pure function of (purpose, seed, index), the same in any process."""

import hashlib

import numpy as np


def permutation(purpose: str, seed: int, index: int, length: int) -> np.ndarray:
    """Return int64[length], a uniform permutation.

    Philox's raw words are stable across NumPy versions, `shuffle` is not.
    """
    key = int.from_bytes(hashlib.sha256(f"{purpose}:{seed}:{index}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(length)
    return np.argsort(words, kind="stable")
