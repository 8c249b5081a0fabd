"""generate and evaluate by a server of OpenAI's API: what comes is kept once, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools.base import declared, durable
from data_tools.chats.samples import problem_of_sample
from data_tools.mistake import UserMistake
from data_tools.prepare import rejection, rejection_element
from data_tools.progress import Stopped
from data_tools.tasks.mix import Entry, MixConfig
from data_tools.tasks.task import Source
from jobs.kind import find_kind, keyed_settings
from megatron_ext.entrypoints import evaluate, generate
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.rollout.endpoint import Endpoint
from megatron_ext.rollout.settings import EngineConfig, Sampling
from tests.megatron_ext.foreign.server import CUT, serving

pytest.importorskip("openai")
PROMPTS, SAMPLES = 6, 2
ROWS = Source(synthetic_rows=40, synthetic_split="heldout")


def settings(server: Any = None, **endpoint: Any) -> dict[str, Any]:
    url = server.url if server else "http://127.0.0.1:9/v1"
    return {"backend": "openai", "endpoint": Endpoint(**{"url": url, "model": "judge", "concurrency": 3, **endpoint})}


def config(server: Any = None, changes: dict[str, Any] | None = None, **endpoint: Any) -> generate.Config:
    values: dict[str, Any] = {"samples": SAMPLES, "sampling": Sampling(max_tokens=9), "seed": 3, "verifiers": 1}
    values["mix"] = MixConfig({"sums": Entry("calculator", source=ROWS, limit=PROMPTS)})
    return generate.Config(**{**values, "chunk": 4, **(changes or {})}, **settings(server, **endpoint))


def made(folder: Path) -> tuple[Path, Path]:
    for name in ("out", "keep"):
        (folder / name).mkdir(parents=True)
    return folder / "out", folder / "keep"


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in open(out / "samples.jsonl")]


def right(asked: dict[str, Any]) -> str:
    """A teacher that can add and multiply."""
    return str(eval(asked["messages"][-1]["content"].rstrip("=")))


def test_a_servers_samples_are_scored_and_are_what_rejection_reads(tmp_path):
    out, keep = made(tmp_path)
    with serving() as server:
        facts = generate.run(config(server), out, keep)
        rows = rows_of(out)
        assert [(row["place"], row["sample"]) for row in rows] == [
            (p, s) for p in range(PROMPTS) for s in range(SAMPLES)
        ]
        assert all(problem_of_sample(row) == "" for row in rows)
        assert len(server.asked) == PROMPTS * SAMPLES and server.most_under_way <= 3
        assert len({asked["seed"] for asked in server.asked}) == PROMPTS * SAMPLES
    assert all(row["weights"] is None and row["ran"] == "judge" and row["prompt_tokens"] == 3 for row in rows)
    assert not any("logprobs" in row for row in rows)  # the server gave none
    told = facts["endpoint"]
    assert told["ran"] == [{"model": "judge", "fingerprint": "fp_1"}]
    assert (told["requests"], told["completion_tokens"]) == (PROMPTS * SAMPLES, facts["tokens"])
    config_ = rejection.Config(inputs=[str(out)], correct=False)
    (tmp_path / "kept").mkdir()
    rejection_element.reject_filter(config_, tmp_path / "kept", rejection_element.Share(0, 1, ()))


def test_what_was_answered_before_a_stop_is_not_asked_again_and_the_rest_is_the_same(tmp_path):
    with serving() as server:
        whole, keep = made(tmp_path / "whole")
        generate.run(config(server), whole, keep)
        server.asked.clear()
        server.wait_s = 0.1
        out, keep = made(tmp_path / "stopped")
        with pytest.raises(Stopped):
            generate.run(config(server), out, keep, stop=lambda: len(server.asked) > 3)
        assert 3 < len(server.asked) < PROMPTS * SAMPLES
        server.wait_s = 0.0
        generate.run(config(server, url=server.url + "/"), out, keep)  # the server may have moved meanwhile
        # those under way at the stop, at most as many as go together, are asked for once more
        assert len(server.asked) <= PROMPTS * SAMPLES + 3
        assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
        server.asked.clear()
        generate.run(config(server), out, keep)
        assert not server.asked


def test_a_stop_does_not_wait_for_answers(tmp_path):
    out, keep = made(tmp_path)
    with serving(wait_s=30.0) as server, pytest.raises(Stopped) as stopped:
        generate.run(config(server), out, keep, stop=lambda: bool(server.asked))
    assert stopped.value.done == 0


def test_a_killed_generation_goes_on_without_a_double_or_a_loss(tmp_path):
    with serving(wait_s=0.02) as server:
        whole, keep = made(tmp_path / "whole")
        generate.run(config(server), whole, keep)
        server.asked.clear()
        server.wait_s = 0.3
        told = {"mix": {"entries": {"sums": {"task": "calculator", "limit": PROMPTS, "source": {"synthetic_rows": 40,
                "synthetic_split": "heldout"}}}}, "samples": SAMPLES, "sampling": {"max_tokens": 9}, "seed": 3,
                "verifiers": 1, "chunk": 4, "backend": "openai",
                "endpoint": {"url": server.url, "model": "judge", "concurrency": 3}}  # fmt: skip
        file, out, keep = tmp_path / "config.yaml", tmp_path / "out", tmp_path / "kept"
        file.write_text(yaml.safe_dump(told))
        command = [sys.executable, "-m", "megatron_ext.entrypoints.generate", "--config", str(file)]
        process = subprocess.Popen([*command, "--out", str(out), "--keep", str(keep)], start_new_session=True)
        try:
            while len(server.asked) < 5:  # the first three have been answered
                assert process.poll() is None
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        killed = {asked["seed"] for asked in server.asked}
        server.wait_s = 0.0
        generate.run(config(server), out, keep)
        assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
        times = Counter(asked["seed"] for asked in server.asked)
        again = [seed for seed, count in times.items() if count > 1]
        assert len(times) == PROMPTS * SAMPLES and len(again) <= 3 and len(again) < len(killed)


def test_a_server_that_fails_now_and_then_costs_no_sample(tmp_path):
    down: Any = (503, {"Retry-After": "0.1"}, {"error": {"message": "loading"}})
    with serving(faults=[down, CUT, (200, {}, "<html>")]) as server:
        out, keep = made(tmp_path)
        facts = generate.run(config(server), out, keep)
    assert facts["samples"] == PROMPTS * SAMPLES
    assert {name for name in facts["endpoint"] if name.startswith("again: ")} == {
        "again: status 503", "again: no connection", "again: no answer",
    }  # fmt: skip


def test_an_answer_that_is_refused_ends_the_phase_and_keeps_the_others(tmp_path):
    def answer(asked: dict[str, Any]) -> Any:
        if len(server.asked) < 4:
            return "4"
        return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}

    with serving(answer=answer) as server:
        out, keep = made(tmp_path)
        with pytest.raises(UserMistake, match=r"answer to prompt .* \(mix\.entries\.sums\) is refused: .*tool_calls"):
            generate.run(config(server, concurrency=1), out, keep)
        server.answer = lambda asked: "4"
        assert generate.run(config(server), out, keep)["samples"] == PROMPTS * SAMPLES
        assert len(server.asked) == PROMPTS * SAMPLES + 1


def test_logprobs_that_the_server_gives_are_in_the_rows(tmp_path):
    def answer(asked: dict[str, Any]) -> Any:
        assert asked["logprobs"]
        choice = {"finish_reason": "stop", "text": "4 2", "logprobs": {"token_logprobs": [-0.5, -1.5]}}
        return {"model": "judge", "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}

    with serving(answer=answer) as server:
        out, keep = made(tmp_path)
        generate.run(config(server, api="completions", logprobs=True), out, keep)
    assert all(row["logprobs"] == [-0.5, -1.5] and row["completion"] == "4 2" for row in rows_of(out))


def test_an_evaluation_asks_greedily_and_at_the_temperature_and_compares(tmp_path):
    with serving() as server:

        def evaluated(name: str, **changes: Any) -> dict[str, Any]:
            out, keep = made(tmp_path / name)
            values = {"source": ROWS, "limit": PROMPTS, "samples": SAMPLES, "verifiers": 1, **changes}
            facts = evaluate.run(evaluate.Config(**values, **settings(server)), out, keep)
            assert durable.read_json(keep / "tables" / "accuracy.json")["title"] == "Accuracy of judge"
            return facts

        before = evaluated("before")
        assert Counter(asked["temperature"] for asked in server.asked) == {0: PROMPTS, 1: PROMPTS * SAMPLES}
        assert before["accuracy"] == 0
        server.answer = right
        after = evaluated("after", compare_with=str(tmp_path / "before" / "out"))
    assert after["prompts"] == PROMPTS and after["accuracy"] == 1 and after["gain"] == 1


def refused(changes: dict[str, Any] | None = None, site: Site | None = None, **endpoint: Any) -> str:
    asked = config(None, changes, **endpoint)
    found = declared.check_with(asked, lambda legal: generate.check(legal, site.ranks if site else 1, site))
    assert found and all("\n" not in str(problem) for problem in found)
    return "\n".join(map(str, found))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model": "folder"}, "model: is not used by backend openai"),
        ({"dtype": "bfloat16"}, "dtype: is not used"),
        ({"engine": EngineConfig(max_batch=2)}, "endpoint.concurrency"),
        ({"parallel": ParallelPlan(tensor=2)}, "parallel: is not used"),
        ({"prompt_tokens": 9}, "prompt_tokens: is not used"),
        ({"bos": "never"}, "bos: is not used"),
        ({"vllm": {"seed": 1}}, "vllm: "),
        ({"sampling": Sampling(top_k=4)}, "sampling.top_k: is not in OpenAI's API; name it in endpoint.takes"),
        ({"sampling": Sampling(min_p=0.1)}, "sampling.min_p: is not in"),
        ({"chat_arguments": {"a": 1}}, "chat_arguments: reach a server as chat_template_kwargs alone"),
        ({"mix": MixConfig({"tool": Entry("tests.data_tools.tasks.verifiers", source=ROWS)})}, "turn by turn"),
        ({"backend": "auto"}, "endpoint: is for backend openai, and backend is auto"),
        ({"backend": "auto"}, "model: is missing"),
    ],
)
def test_plan_refuses_what_a_server_would_not_be_told(changes, named):
    if "backend" in changes:
        found = generate.check(replace(config(), backend="auto"), 1)
        assert named in "\n".join(map(str, found))
    else:
        assert named in refused(changes)


@pytest.mark.parametrize(
    "endpoint, named",
    [
        ({"url": ""}, "endpoint.url: is missing"),
        ({"url": "judge:8000/v1"}, "endpoint.url: 'judge:8000/v1' is no address"),
        ({"url": "http://me:hidden-word@judge/v1"}, "holds a user, a password or a query"),
        ({"url": "http://judge/v1?key=hidden-word"}, "holds a user, a password or a query"),
        ({"model": ""}, "endpoint.model: is missing"),
        ({"key": "sk-hidden-word"}, "endpoint.key: is no reference; write env:NAME"),
        ({"key": "env:hidden-word"}, "endpoint.key: is no reference"),
        ({"key": "file:hidden-word"}, "endpoint.key: is no reference"),
        ({"extra": {"api_key": "hidden-word"}}, "endpoint.extra.api_key: says that it is a secret"),
        ({"extra": {"temperature": 0}}, "is said by sampling.temperature"),
        ({"extra": {"tools": []}}, "an answer that calls a tool is no completion"),
        ({"takes": ["top_q"]}, "did you mean top_k?"),
        ({"leave_out": ["temperature"]}, ""),
        ({"api": "completions", "takes": ["chat_template_kwargs"]}, "a text has no template"),
    ],
)
def test_plan_refuses_what_cannot_be_an_endpoint_and_shows_no_secret(endpoint, named):
    if named:
        said = refused({}, **endpoint)
        assert named in said and "hidden-word" not in said
    else:
        assert generate.check(config(None, **endpoint), 1) == []
        assert "only 1, which is no change" in refused({"sampling": Sampling(temperature=0.5)}, **endpoint)


def test_a_role_with_gpus_is_refused_for_a_server_has_its_own():
    assert "8 ranks and 8 GPUs a node" in refused({}, Site(8, gpus_per_node=8))
    assert generate.check(config(), 1, Site(1, gpus_per_node=0)) == []
    assert evaluate.check(evaluate.Config(source=ROWS, **settings()), 1, Site(1, gpus_per_node=0)) == []


def test_the_key_names_what_changes_the_samples_and_not_where_the_server_is():
    def key(**endpoint: Any) -> str:
        return durable.canonical_json(keyed_settings(generate.Config, config(None, **endpoint)))

    same = {"url": "http://other/v1", "key": "env:K", "concurrency": 9, "retries": 1, "timeout_s": 1.0}
    assert key(**same, requests_per_minute=5) == key()
    others = [
        {"model": "teacher"}, {"revision": "fp8"}, {"api": "completions"}, {"takes": ["top_k"]}, {"extra": {"a": 1}},
        {"leave_out": ["seed"]}, {"limit_as": "max_completion_tokens"}, {"logprobs": True}, {"ignored": ["a"]},
    ]  # fmt: skip
    assert len({key(), *(key(**other) for other in others)}) == len(others) + 1


def test_the_secrets_of_a_phase_are_those_that_its_endpoint_refers_to():
    kind = find_kind("generate")
    assert kind.secrets(config(None, key="env:TEACHER")) == {"TEACHER": "env:TEACHER"}
    assert kind.secrets(config(None, key="file:/k")) == {"AFTEROK_ENDPOINT_KEY": "file:/k"}
    assert kind.secrets(config()) == kind.secrets(config(None, key="sk-literal")) == {}


def test_no_torch_is_needed_to_ask_a_server():
    code = "import sys; from megatron_ext.entrypoints import evaluate, generate; from megatron_ext.foreign import "
    code += "openai_backend; sys.exit(bool({'torch', 'megatron', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
