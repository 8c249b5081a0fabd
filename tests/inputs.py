"""Inputs of tests: small ones, written for them, and the public data that they resemble, where those are.

tests/shipped has files of the names and schemas of ../shared/data. A test that takes `inputs` is run on both; only of
the public ones may it be skipped.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

SHIPPED = Path(__file__).parent / "shipped"
SHARED = Path(__file__).parents[2] / "shared"
ORIGINS = ("shipped", "public")
# For tests that take seconds a file: the public ones under soak.
QUICK_ON_SHIPPED = pytest.mark.parametrize(
    "inputs", ["shipped", pytest.param("public", marks=pytest.mark.soak)], indirect=True
)


@dataclass(frozen=True)
class Inputs:
    """Files of one origin."""

    origin: str

    @property
    def shipped(self) -> bool:
        return self.origin == "shipped"

    def data(self, name: str) -> Path:
        """Return a data file or folder; skip the test where there is no such public one."""
        return SHIPPED / name if self.shipped else public("data", name)

    def lines(self, name: str) -> int:
        """Return how many lines a file has, or records a JSON file of one list: as it was written."""
        return (LINES if self.shipped else PUBLIC_LINES)[name]


def public(*parts: str) -> Path:
    """Return a file of the public data; skip the test where there is none."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {path}: the public data are not on this machine")
    return path


PUBLIC_LINES = {
    "tau_bench/gpt-4o-airline.json": 200, "llamafactory/glaive_toolcall_en_demo.json": 300,
    "llamafactory/glaive_toolcall_zh_demo.json": 300, "llamafactory/reason_tool_use_demo_50.jsonl": 50,
    "llamafactory/v1_sft_demo.jsonl": 500, "gsm8k/test.jsonl": 1319, "math500/test.jsonl": 500,
    "qwen_math/aime24.test.jsonl": 30, "qwen_math/mmlu_stem.test.jsonl": 3018,
}  # fmt: skip
LINES = dict(zip(PUBLIC_LINES, (12, 3, 3, 3, 4, 7, 30, 3, 6)))
