"""A few rows of each data set of the R1 pipelines, in its own schema, and the overrides that make them read."""

import json
from pathlib import Path
from typing import Any

APART = "tests.data_tools.tasks.verifiers:apart"
WORDS = "one two three four five six seven eight nine ten".split()


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def rows() -> dict[str, list[dict[str, Any]]]:
    """A few rows of each data set in its own schema; of Dolci-Think with the categories that dolci_prepare gives."""
    sums = [(a, b) for a in range(1, 7) for b in range(1, 5)]
    text = [f"A train needs {WORDS[a]} hours and waits {WORDS[b]}; how long is it away" for a, b in sums]
    categories = ["reasoning", "code", "chat", "short"]
    return {
        "openthoughts": [
            {"conversations": said(q, f"<think>{a} and {b}.</think>\n\n{a + b}"), "domain": "math", "difficulty": 2}
            for q, (a, b) in zip(text, sums)
        ],
        "smoltalk": [chat(f"Hello {n}", "Hi. " * (n % 3 + 1), source="smol-magpie-ultra") for n in range(20)],
        "smoltalk_test": [chat(f"Hi {n}", "Hello.", source="smol-magpie-ultra") for n in range(4)],
        "dolci": [
            chat(q, f"<think>{a}+{b}</think>{a + b}", source="allenai/wildchat", category=categories[n % 4])
            for n, (q, (a, b)) in enumerate(zip(text, sums))
        ],
        "gsm8k": [
            {"question": q, "answer": f"It is <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
            for q, (a, b) in zip(text, sums)
        ],
        "gsm8k_test": [{"question": "What is 2 + 2 of the eggs that she has?", "answer": "#### 4"}],
        "dapo": [
            {"prompt": [{"role": "user", "content": f"Solve: {q}"}], "reward_model": {"ground_truth": str(a + b)}}
            for q, (a, b) in zip(text, sums)
        ],
        "choices": [
            {"id": str(n), "question": f"Which of {n}?", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
             "answerKey": "A"} for n in range(6)
        ],
        "math500": [{"problem": "What is half of ten?", "answer": "5", "solution": "It is $\\boxed{5}$."}],
        "aime": [{"problem": "What is a third of nine?", "answer": "3"}],
    }  # fmt: skip


def written(folder: Path) -> dict[str, str]:
    """Write a file of each data set; return their paths by name."""
    found = {}
    for name, lines in rows().items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[name] = str(path)
    return found


def tasks(files: dict[str, str], **names: str) -> list[str]:
    """Overrides that give tasks their files."""
    return [f"params.{param}.source.inputs=[{files[name]}]" for param, name in names.items()]


def small(nanochat: Path, files: dict[str, str]) -> list[str]:
    chats = {"openthoughts": "openthoughts", "smoltalk": "smoltalk", "gsm8k_chats": "gsm8k", "dolci": "dolci",
             "smoltalk_test": "smoltalk_test", "arc_test": "choices"}  # fmt: skip
    given = [f"params.{param}={{inputs: [{files[name]}]}}" for param, name in chats.items()]
    given += tasks(files, gsm8k="gsm8k", gsm8k_test="gsm8k_test", science="choices", math500="math500", aime="aime")
    given += [f"params.dapo={{task: '{APART}', source: {{inputs: [{files['dapo']}]}}}}"]
    sizes = "pack_length=256 global_batch=2 warmup_steps=0 cold_steps=2 grpo_steps=1 rs_steps=2 prompts=2 samples=2"
    sizes += " max_tokens=8 evaluation_samples=2 elements=2"
    given += [f"params.{size}" for size in [f"nanochat={nanochat}", "tag=d2", *sizes.split()]]
    engine = "engine={kv_gib: 0.05, block_size: 16, max_batch: 16}"
    phases = ("cold_evaluated", "grpo", "grpo_evaluated", "sampled", "rs_evaluated")
    given += [f"{phase}.with.{engine}" for phase in phases]
    given += [f"{phase}.resources={{role: cpu}}" for phase in (*phases, "cold_start", "rs_sft")]
    all_count = ["advantage.drop_equal_groups=false", "rewarding.mask_truncated=false", "refill_tries=0"]
    given += [f"grpo.with.{setting}" for setting in all_count]
    given += [f"kept.with.{setting}" for setting in ("correct=false", "truncated=true", "max_pass_rate=1")]
    return [*given, "cluster=local"]
