"""How much readers take: each bound has a default here, and a variable of the environment that raises it.

    AFTEROK_LINE_MIB=1024 afterok plan pipeline.yaml          # for phases: in `env.set` of the profile

What is larger is refused, and the message says which bound was hit and what raises it. A bound is no setting of a
phase: the same bytes are read alike whatever it is, so it is in no key.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_tools.mistake import Problem, UserMistake

MIB = 1 << 20


@dataclass(frozen=True)
class Bound:
    """Represents the most that a reader takes of something."""

    variable: str  # of the environment, that sets another
    default: int
    of: str  # what is counted, as a message says it
    unit: int = 1  # the things, such as bytes, that one of the variable's numbers stands for

    @property
    def most(self) -> int:
        """The most of it, in single things. Raise UserMistake where the variable holds no positive whole number."""
        text = os.environ.get(self.variable)
        return self.said(text) if text else self.default * self.unit

    def said(self, text: str) -> int:
        """Return how much the variable allows where it holds `text`, or raise UserMistake."""
        if not text.isascii() or not text.isdigit() or not 0 < len(text) < 10 or not int(text):
            raise UserMistake(f"variable {self.variable}: {text!r:.40} is no whole number from 1 on")
        return int(text) * self.unit

    def exceeded(self) -> str:
        """Return what is said of a thing that has more than is taken."""
        return (
            f"more than {self.most // self.unit:,} {self.of}, the most that is read; {self.variable} raises it "
            "(for phases in the profile's env.set)"
        )


LINE = Bound("AFTEROK_LINE_MIB", 256, "MiB in one record", MIB)  # a line, a row of Parquet, a cell of CSV
JSON = Bound("AFTEROK_JSON_MIB", 1024, "MiB of JSON in one piece", MIB)
JSON_DEPTH = Bound("AFTEROK_JSON_DEPTH", 200, "levels of JSON within each other")
CSV = Bound("AFTEROK_CSV_MIB", 2048, "MiB of CSV", MIB)
YAML = Bound("AFTEROK_YAML_MIB", 4, "MiB of YAML", MIB)
YAML_VALUES = Bound("AFTEROK_YAML_VALUES", 1_000_000, "values of YAML, those of aliases counted each time")
YAML_DEPTH = Bound("AFTEROK_YAML_DEPTH", 100, "levels of YAML within each other")
TEMPLATE = Bound("AFTEROK_TEMPLATE_MIB", 1, "MiB of a chat template", MIB)
BOUNDS = (LINE, JSON, JSON_DEPTH, CSV, YAML, YAML_VALUES, YAML_DEPTH, TEMPLATE)


class NoFile(OSError):
    """Raised for what is no regular file: a pipe or a device, which may never end, or a folder."""

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read its bytes, without waiting. Raise NoFile for anything else, OSError as open does."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # of a pipe, open waits for who writes
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NoFile(0, "is no regular file: a pipe, a device or a folder", str(path))
    return open(handle, "rb")


def read_bytes(path: Path, bound: Bound) -> bytes:
    """Return what a regular file holds. Raise UserMistake where that is more than the bound, OSError as open does."""
    with open_regular(path) as file:
        data: bytes | None = file.read(bound.most + 1)
    if data is None:  # of a file of the kernel's that would have to be waited for
        raise NoFile(0, "gives nothing: it is of the kernel's", str(path))
    if len(data) > bound.most:
        raise UserMistake(Problem(str(path), f"has {bound.exceeded()}"))
    return data


def read_text(path: Path, bound: Bound) -> str:
    """Return the text of a regular file in UTF-8, its line ends as Python reads them. Raise as `read_bytes` does, and
    UnicodeDecodeError."""
    return read_bytes(path, bound).decode().replace("\r\n", "\n").replace("\r", "\n")
