import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.chats.conversation import read_record
from data_tools.mistake import UserMistake
from data_tools.prepare.dolci import (
    LANGUAGES,
    SHARES,
    SOURCES,
    Config,
    _identifier,
    category_of,
    check,
    draw,
    is_language,
    named_by,
    priority,
    prose,
    quotas,
    sample_shard,
)
from tests.inputs import Inputs

GERMAN = (
    "Die Würde des Menschen ist unantastbar und sie zu achten und zu schützen "
    "ist Verpflichtung aller staatlichen Gewalt "
) * 2
THOUGHT = "First this. Then that. Now the other. And one more. "


def row(source: str, thinking: str, answer: str, question: str = "What is it?") -> dict:
    content = f"<think>{thinking}</think>{answer}" if thinking else answer
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": content}],
        "source": source,
    }


@pytest.mark.parametrize(
    "given_row, category",
    [
        (row("allenai/wildguardmix", THOUGHT, "Here you are."), "safety"),
        (row("OpenThoughts", THOUGHT, "I'm sorry, but I can't help with that."), "safety"),
        (row("OpenThoughts3", "It is two.", "2"), "short"),
        (row("nemotron-code", THOUGHT, "done"), "code"),
        (row("SYNTHETIC-2", THOUGHT, "done"), "reasoning"),
        (row("allenai/WildChat-4.8M", THOUGHT, "done"), "chat"),
        (row("unknown", THOUGHT, "so:\n```python\nprint(1)\n```"), "code"),
        (row("unknown", THOUGHT, "the answer is \\boxed{2}"), "reasoning"),
        (row("unknown", "", "Hello! How can I help you?"), "chat"),
    ],
)
def test_a_row_has_one_category(given_row: dict, category: str) -> None:
    assert category_of(read_record(given_row)[0], given_row["source"], SOURCES) == category


REAL = {  # dataset_source of Dolci-Think-SFT-7B; what its card says that each is
    "saumyamalik/OpenThoughts3-full-filtered-math-decontam-v2": "reasoning",
    "saumyamalik/OpenThoughts3-full-filtered-science-decontam-v2": "reasoning",
    "allenai/SYNTHETIC-2-SFT-cn-fltrd-final-ngram-filtered-chinese-filtered": "reasoning",
    "saumyamalik/OpenThoughts3-full-filtered-code-subsampled-decontam-v2": "code",
    "saumyamalik/correct-python-sft-187k-x16-thoughts-filtered-decontam-v2": "code",
    "allenai/nemotron-post-training-dataset-subset-ngram-filtered-no-tool-calls": "code",
    "saumyamalik/if_qwq_reasoning_verified_filtered_decontam_v2": "chat",  # precise instructions
    "allenai/persona-precise-if-r1-final-content-filtered-chinese-filtered": "chat",
    "allenai/tulu_v3.9_wildchat_100k_english-r1-final-content-filtered": "chat",
    "allenai/wildchat-r1-p2-repetition-filter": "chat",
    "allenai/oasst1-r1-format-filtered-keyword-filtered-filter-datecutoff-chinese-filtered": "chat",
    "allenai/aya-100k-r1-format-filtered-keyword-filtered-filter-datecutoff-ngram-filtered": "chat",
    "allenai/coconot-r1-format-domain-filtered-keyword-filtered-filter-datecutoff-chinese-filtered": "safety",
    "allenai/wildguardmix-r1-v2-all-filtered-ngram-filtered-chinese-filtered": "safety",
    "allenai/wildjailbreak-r1-v2-format-filtered-keyword-filtered-filter-datecutoff-final-content-filtered": "safety",
    "allenai/tablegpt_r1-format-filtered-keyword-filtered-filter-datecutoff": "",  # by the text
    "allenai/tulu-3-sft-personas-math": "reasoning",  # of other data sets
    "facebook/natural_reasoning": "reasoning",
}


@pytest.mark.parametrize("source, category", REAL.items())
def test_the_data_sets_own_labels_mean_what_its_card_says(source: str, category: str) -> None:
    assert named_by(source.lower(), SOURCES) == category


def test_the_language_filter_abstains_on_code_and_maths() -> None:
    assert is_language("A short list of the things that we have seen on the way to the sea. " * 3, "en")
    assert not is_language(GERMAN, "en") and is_language(GERMAN, "de")
    assert is_language("```python\nfuer = lambda zahl: zahl ** 2\n```\n$\\frac{1}{2}$ = 0.5", "en")


def test_the_language_filter_knows_english_from_all_others(inputs: Inputs) -> None:
    fixtures = json.loads(inputs.data("langid/udhr_fixtures.json").read_text())
    texts = [entry for entry in fixtures.values() if len(prose(entry["text"])) >= 60]
    assert len(texts) > (20 if inputs.shipped else 150)
    wrong = [entry["iso6393"] for entry in texts if is_language(entry["text"], "en") != (entry["iso6393"] == "eng")]
    assert set(wrong) <= {"sco"}  # Scots passes for English


counts = st.fixed_dictionaries({name: st.integers(0, 500) for name in SHARES})


@given(counts, st.integers(1, 1500), st.sampled_from(["proportional", "none"]))
def test_quotas_draw_what_there_is_and_never_more_than_the_target(
    available: dict, target: int, redistribute: str
) -> None:
    drawn = quotas(available, SHARES, target, redistribute)
    assert all(0 <= drawn[name] <= available[name] for name in SHARES)
    if redistribute == "proportional":
        assert sum(drawn.values()) == min(target, sum(available.values()))
    full = quotas(dict.fromkeys(SHARES, 10**6), SHARES, target, redistribute)
    assert sum(full.values()) == target
    assert all(abs(full[name] - SHARES[name] * target) < 1 for name in SHARES)
    if redistribute == "none":
        assert drawn == {name: min(full[name], available[name]) for name in SHARES}


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Two files: of each category 30 rows, some duplicates, some German, a few too long."""
    kinds = {"reasoning": ("math", THOUGHT), "code": ("python", THOUGHT), "chat": ("wildchat", ""),
             "safety": ("coconot", ""), "short": ("misc", "One.")}  # fmt: skip
    rows = [
        row(source, think, f"it is {i}", f"{name} {i}") for name, (source, think) in kinds.items() for i in range(30)
    ]
    rows += rows[:3] + [row("math", GERMAN, GERMAN, f"Frage {i}") for i in range(4)] + [row("math", THOUGHT * 100, "x")]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for number, path in enumerate(paths):
        path.write_text("".join(json.dumps(r) + "\n" for r in rows[number::2]))
    return [str(path) for path in paths]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path / "bytes"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<e>", "<p>"])}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["<e>", "<p>"])
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>", "pad_token": "<p>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def prepared(folder: Path, config: Config, count: int) -> tuple[dict, bytes]:
    parts = []
    for index in range(count):
        parts.append(folder / f"{count}.{index}")
        parts[-1].mkdir()
        sample_shard(config, parts[-1], index, count)
    out = folder / f"out{count}"
    out.mkdir()
    return draw(config, parts, out), (out / "sample.jsonl").read_bytes()


def test_the_sample_has_its_shares_adds_up_and_is_the_same_for_any_number_of_elements(
    tmp_path: Path, shards: list[str], tokenizer: str
) -> None:
    config = Config(inputs=shards, tokenizer=tokenizer, target_rows=60, max_tokens=1500)
    facts, sample = prepared(tmp_path, config, 1)
    assert facts["drawn"] == {"reasoning": 24, "code": 12, "chat": 9, "safety": 6, "short": 9}
    rows = [json.loads(line) for line in sample.splitlines()]
    assert len(rows) == 60 and len({json.dumps(r["messages"]) for r in rows}) == 60
    total = dict(zip(facts["tables"]["balance"]["columns"], facts["tables"]["balance"]["rows"][-1]))
    assert (total["duplicate"], total["not_en"], total["too_long"], total["kept"], total["not_drawn"]) == (
        3,
        4,
        1,
        60,
        90,
    )
    assert all(prepared(tmp_path, config, count)[1] == sample for count in (2, 5))
    assert prepared(tmp_path, Config(**{**vars(config), "seed": 1}), 3)[1] != sample


def test_a_share_that_cannot_be_filled_is_told_and_goes_where_the_policy_says(
    tmp_path: Path, shards: list[str], tokenizer: str
) -> None:
    values = {"inputs": shards, "tokenizer": tokenizer, "target_rows": 100}
    facts, _ = prepared(tmp_path, Config(**values), 1)
    assert facts["short"] == {"reasoning": 10} and facts["rows"] == 100 and facts["drawn"]["reasoning"] == 30
    facts, _ = prepared(tmp_path, Config(**values, redistribute="none"), 2)
    assert facts["rows"] == 90
    with pytest.raises(UserMistake, match="reasoning has 30 of 40 rows; lower target_rows, change shares, or set"):
        prepared(tmp_path, Config(**values, redistribute="fail"), 3)


def test_a_record_that_is_none_is_named_or_counted(tmp_path: Path, shards: list[str], tokenizer: str) -> None:
    with open(shards[0], "ab") as file:
        file.write(b'{"messages": 3}\n\xff\n\n')
    config = Config(inputs=shards, tokenizer=tokenizer, target_rows=10)
    with pytest.raises(UserMistake, match=r"a.jsonl:\d+: .*; mend the record, or set on_bad_row: bucket"):
        prepared(tmp_path, config, 1)
    config.on_bad_row = "bucket"
    facts, _ = prepared(tmp_path, config, 2)
    first = dict(zip(facts["tables"]["balance"]["columns"], facts["tables"]["balance"]["rows"][0]))
    assert (first["malformed_record"], first["malformed_line"], first["blank_line"]) == (1, 1, 1)


@pytest.mark.parametrize("more", [{"chat_template_kwargs": {"a": 1}}, {"tools": [{"name": "f"}]}, {"weight": 0}])
def test_chats_that_differ_beside_their_messages_are_no_duplicates(more: dict) -> None:
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (plain,), (other,) = read_record(record), read_record({**record, **more})
    assert plain.messages == other.messages and priority(0, plain) != priority(0, other)


def test_of_equal_rows_the_first_files_counts_for_any_number_of_elements(tmp_path: Path, tokenizer: str) -> None:
    rows = [row("math", THOUGHT, "it is", f"question {number}") for number in range(8)]
    files = {"a.jsonl": rows, "b.jsonl": [{**each, "source": "wildchat"} for each in reversed(rows)]}
    for name, lines in files.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = Config(inputs=[str(tmp_path / name) for name in files], tokenizer=tokenizer, target_rows=8)
    facts, sample = prepared(tmp_path, config, 1)
    assert facts["drawn"]["reasoning"] == 8
    assert all(prepared(tmp_path, config, count)[1] == sample for count in (2, 3, 16))


@pytest.mark.parametrize("wrong, said", [
    ({"language": "EN"}, r"language: 'EN' is no language that is told apart \(did you mean en\?"),
    ({"language": "english"}, "language: 'english' is no language"),
    ({"sources": {"code": ["Python"]}}, "sources.code: 'Python' is in no source's name; write it in lower case"),
    ({"sources": {"chat": ["a", ""]}}, "sources.chat: '' is in no source's name"),
])  # fmt: skip
def test_what_no_row_would_ever_match_is_refused(wrong: dict, said: str) -> None:
    with pytest.raises(UserMistake, match=said):
        raise UserMistake(check(Config(inputs=["x"], tokenizer="x", **wrong)))


def test_the_languages_are_those_that_are_told_apart() -> None:
    assert LANGUAGES == sorted({name for name in _identifier().nb_classes if len(name) == 2})


def test_a_sample_without_rows_is_refused_with_what_became_of_them(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row("math", "", GERMAN)) + "\n\n")
    with pytest.raises(UserMistake, match=r"no row can be drawn \(1 blank_line, 1 not_en\)"):
        prepared(tmp_path, Config(inputs=[str(tmp_path / "a.jsonl")], tokenizer=tokenizer), 2)


def test_a_source_of_null_is_none_and_half_a_surrogate_pair_is_told_with_its_place(
    tmp_path: Path, tokenizer: str
) -> None:
    lines = [
        {**row("", "", "x"), "source": None, "dataset_source": "wildguard"},
        row("math", "", "x", "\ud800"),
        {**row("math", "", "y"), "id": "\ud800"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = Config(inputs=[str(tmp_path / "a.jsonl")], tokenizer=tokenizer, target_rows=9, on_bad_row="bucket")
    facts, sample = prepared(tmp_path, config, 1)
    assert facts["drawn"]["safety"] == 1 and facts["rows"] == 2
    assert {json.loads(line).get("id") for line in sample.splitlines()} == {None, "\ud800"}
    config.on_bad_row = "fail"
    with pytest.raises(UserMistake, match="a.jsonl:2: not Unicode"):
        prepared(tmp_path, config, 2)
