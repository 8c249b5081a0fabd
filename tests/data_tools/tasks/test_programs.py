"""HumanEval and MBPP: code is found in completions, and scored through the verifiers' process and its sandboxes."""

import pytest

from data_tools.answers import sandbox
from data_tools.mistake import UserMistake
from data_tools.tasks import humaneval, mbpp
from data_tools.tasks.mix import Entry, MixConfig, check_mix, check_verdicts
from data_tools.tasks.programs import code_of
from data_tools.tasks.rewards import NOT_SCORABLE, Scorer, Verifier
from data_tools.tasks.task import Source

sandboxed = pytest.mark.skipif(bool(sandbox.why_not()), reason="this machine has no sandbox (sandbox.why_not says why)")

HEAD = '''from typing import List


def doubled(values: List[int]) -> List[int]:
    """ Return twice each value. Helpers are to be had: see `half`.
    >>> doubled([1])
    [2]
    """
'''
HUMANEVAL = {
    "task_id": "HumanEval/0", "prompt": "def half(x):\n    return x / 2\n\n\n" + HEAD, "entry_point": "doubled",
    "canonical_solution": "    return [2 * value for value in values]\n",
    "test": "\n\nMETADATA = {'author': 'us'}\n\n\ndef check(candidate):\n    assert candidate([]) == []\n"
            "    assert [half(x) for x in candidate([1, 2])] == [1, 2]\n    assert doubled([3]) == [6]\n",
}  # fmt: skip
MBPP = {
    "task_id": 601, "text": "Write a function to find the longest chain of pairs.",
    "code": "class Pair(object):\r\n    def __init__(self, a, b):\r\n        self.a = a\r\n        self.b = b\r\n"
            "def chain(arr, n):\r\n    return max(one.b for one in arr)",
    "test_list": ["assert chain([Pair(5, 24), Pair(15, 25)], 2) == 25",
                  "assert math.sqrt(chain([Pair(1, 4)], 1)) == 2"],
    "test_setup_code": "import math", "challenge_test_list": [],
}  # fmt: skip
SANITIZED = {
    "source_file": "x", "task_id": 602, "prompt": "Write a function to add.",
    "code": "def sum(a, b):\n    return a + b",
    "test_imports": ["import math"],
    "test_list": ["assert sum(1, 2) == 3", "assert math.isclose(sum(0.1, 0.2), 0.3)"],
}  # fmt: skip
PATIENT = {"time_limit_s": 100.0}


def scored(task, record: dict, completions: list[str], **options) -> list:
    own = task.Options(**PATIENT, **options)
    [item] = task.items(record, own)
    verifiers = {"t": Verifier(task.__name__.rpartition(".")[2], {**PATIENT, **options})}
    with Scorer(verifiers, workers=2, time_limit_s=120.0) as scorer:
        return [future.result() for future in [scorer.submit("t", item, text) for text in completions]]


BODY = HUMANEVAL["canonical_solution"]


@sandboxed
def test_humaneval_completions_of_either_kind_are_run_against_their_tests():
    right = f"Sure:\n```python\ndef doubled(values):\n{BODY}```\nIt doubles."
    thought = f"<think>```python\ndef doubled(values):\n    return 1\n```</think>\n{right}"
    body = f"```python\n{BODY}```"
    wrong = right.replace("2 *", "3 *")
    ends = [
        "```python\nimport sys\nsys.exit(0)\n```",
        "```python\nimport os\nos._exit(0)\n```",
        "print('passed')",
        "",
        "no",
    ]
    found = scored(humaneval, HUMANEVAL, [right, thought, body, wrong, *ends])
    assert [one.reward for one in found] == [1.0, 1.0, 1.0] + [0.0] * 6
    base = [
        BODY,
        f"{BODY}\ndef other():\n    pass\nassert False\n",
        "    return values\n",
        f"{BODY}\nprint('x'",
        "return 1",
    ]
    found = scored(humaneval, HUMANEVAL, base, chat=False)
    assert [one.reward for one in found] == [1.0, 1.0, 0.0, 1.0, 0.0]


@sandboxed
@pytest.mark.parametrize("record", [MBPP, SANITIZED])
def test_mbpp_programs_are_run_against_the_assertions_of_their_row(record):
    right = f"```python\n{record['code']}\n```"
    wrong = right.replace("max(", "min(").replace("a + b", "a - b")
    assert [one.reward for one in scored(mbpp, record, [right, wrong, "I cannot."])] == [1.0, 0.0, 0.0]
    ended = f"{record['code']}\n[DONE]\nassert False"
    assert [one.reward for one in scored(mbpp, record, [ended], chat=False)] == [1.0]


@sandboxed
def test_a_row_whose_tests_cannot_be_run_is_not_scorable_and_a_hanging_program_fails():
    lost = SANITIZED | {"test_list": ["import no_such_module"]}
    [found] = scored(mbpp, lost, ["```python\ndef sum(a, b):\n    return a + b\n```"])
    assert found.reward is None and found.note == NOT_SCORABLE
    [item] = mbpp.items(SANITIZED, mbpp.Options())
    hangs = "```python\ndef sum(a, b):\n    while True:\n        pass\n```"
    assert mbpp.rewards(item, hangs, mbpp.Options(time_limit_s=2.0)) == {"correct": 0.0}


HOSTILE = [
    "while True:\n    pass",
    "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "x = bytearray(10 << 30)",
    "import shutil\nshutil.rmtree('/usr')",
    "import socket\nsocket.create_connection(('127.0.0.1', 22))",
    "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\nos._exit(0)",
    "import os\nwith open(os.memfd_create('x'), 'wb') as file:\n    while True:\n        file.write(bytes(1 << 20))",
    "import ctypes\nassert ctypes.CDLL(None).shmget(0, 10 << 30, 0o1600) >= 0",
    "for number in range(1 << 20):\n    open(f'/tmp/{number}', 'wb').write(bytes(10 << 20))",
    "import os, mmap\nos.truncate('/tmp/x', 10 << 30)\nmmap.mmap(os.open('/tmp/x', os.O_RDWR), 10 << 30)",
    "import ctypes\nassert ctypes.CDLL(None).unshare(1 << 28) == 0",
    "import glob\nprint([open(name).read() for name in glob.glob('/proc/*/environ')][0])",
    "import os\nprint(open(f'/proc/{os.getppid()}/cmdline').read())",
]


@sandboxed
def test_hostile_programs_are_failed_samples_and_the_run_goes_on():
    [item] = mbpp.items(SANITIZED, mbpp.Options())
    verifiers = {"hasty": Verifier("mbpp", {"time_limit_s": 3.0}), "patient": Verifier("mbpp", PATIENT)}
    with Scorer(verifiers, workers=2, time_limit_s=120.0) as scorer:
        asked = [scorer.submit("hasty", item, f"```python\n{program}\n```") for program in HOSTILE]
        after = scorer.submit("patient", item, f"```python\n{SANITIZED['code']}\n```")
        assert [one.result().reward for one in asked] == [0.0] * len(HOSTILE) and after.result().reward == 1.0


def test_prompts_are_those_of_the_schemas():
    [item] = humaneval.items(HUMANEVAL, humaneval.Options(chat=False))
    assert item.prompt == HUMANEVAL["prompt"]
    [item] = humaneval.items(HUMANEVAL, humaneval.Options())
    assert HEAD.strip() in item.prompt[0]["content"] and "```python" in item.prompt[0]["content"]
    [item] = mbpp.items(MBPP, mbpp.Options(chat=False))
    assert item.prompt.startswith(
        "You are an expert Python programmer, and here is your task: Write a function to find"
    )
    assert item.prompt.endswith(f"pass these tests:\n\n{MBPP['test_list'][0]}\n{MBPP['test_list'][1]}\n[BEGIN]\n")
    assert item.columns["calls"] == ["Pair", "chain"]


@pytest.mark.parametrize("change, message", [
    ({"test_list": []}, "'test_list' is no list"), ({"code": "def"}, "its code is no Python: .*, line 1"),
    ({"code": "x = 1"}, "defines no function"), ({"code": None}, "no text under 'code'"),
    ({"test_imports": "import math"}, "'test_imports' is no list of lines"),
    ({"test_imports": [None]}, "'test_imports' is no list of lines"), ({"test_setup_code": 1}, "is no text"),
])  # fmt: skip
def test_a_row_that_is_malformed_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        mbpp.items(MBPP | change, mbpp.Options())


def test_the_code_of_a_completion_is_the_last_block_that_defines_what_is_asked():
    one, two = "```python\ndef f():\n    pass\n```", "```\nprint(f())\n```"
    assert code_of(f"{one}\n{two}", ["f"]) == "def f():\n    pass\n" and code_of(two, ["f"]) == "print(f())\n"
    again = "```python\ndef f():\n    return 2\n```"
    assert code_of(f"{one}\nBetter:\n{again}\n{two}", ["f"]) == "def f():\n    return 2\n"
    assert code_of("def f(): pass", ["f"]) == "def f(): pass"
    assert code_of("```python\ndef f():\n    return 1", ["f"]) == "def f():\n    return 1"  # cut off in its block
    assert code_of("<think>def f(): pass", ["f"]) == ""


@pytest.mark.parametrize("completion", [
    "```python3 title=\"f\"\n{code}\n```", "```{{.python}}\n{code}\n```", "~~~python\n{code}\n~~~",
    "````\n{code}\n````",
    "1. So:\n\n   ```python\n{indented}\n   ```\n", "Here: ```python\n{code}\n```", "a ``` b.\n```py\n{code}\n```",
])  # fmt: skip
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_a_block_is_found_however_its_fence_is_written(completion, newline):
    """Also where the code has fences of its own, in a docstring."""
    code = 'def f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n\n    return x'
    indented = "\n".join(f"   {line}" if line else "" for line in code.split("\n"))
    assert code_of(completion.format(code=code, indented=indented).replace("\n", newline), ["f"]) == f"{code}\n"


def test_a_program_may_not_take_longer_than_its_verdict():
    config = MixConfig({"mbpp": Entry("mbpp", {"time_limit_s": 9.5}, source=Source(["x"]))})
    [problem] = check_verdicts(config, 10.0)
    assert str(problem).startswith("mix.entries.mbpp.options: a verdict may take 10.5 s, and verify_limit_s is 10")
    assert not check_verdicts(config, 12.0)


def test_without_a_sandbox_the_tasks_are_refused_before_anything_is_sampled(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: "there is no sandbox")
    config = MixConfig({"humaneval": Entry(source=Source(inputs=["x"])), "code": Entry("mbpp", source=Source(["y"]))})
    told = [str(problem) for problem in check_mix(config)]
    assert told == [f"mix.entries.{name}: there is no sandbox" for name in ("humaneval", "code")]
    with pytest.raises(UserMistake, match="there is no sandbox"):
        humaneval.warm_up()
