"""Recipes: the seed's mixtures by name, a pure function of rows and seed, shares reported, nothing misspelt lost."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.base.durable import read_json
from data_tools.chats.conversation import read_record
from data_tools.mistake import UserMistake
from data_tools.packs.materialize import Config, check
from data_tools.packs.pack import Config as PackConfig
from data_tools.packs.pack import pack
from data_tools.packs.store import Store
from data_tools.recipes.draw import KEPT, NOT_DRAWN, VALIDATION, draw
from data_tools.recipes.recipe import Files, Recipe, RecipeSource, names, resolve, told, unread
from data_tools.recipes.views import View
from data_tools.records import sources
from data_tools.records.balance import Balance
from data_tools.tasks.task import Source
from jobs.kind import inputs as inputs_of
from jobs.kind import keyed_settings
from jobs.phases import materialize as phase
from tests.data_tools.chats import write_tokenizer
from tests.data_tools.conftest import build

SHARES = {  # of the seed's recipes (nanochat/data_recipes.py of its repository), of what is mixed
    "default": {},
    "r1_ot": {},
    "r1_ot_mixed": {"openthoughts": 0.7, "smoltalk": 0.3},
    "dolci_hf": {},
    "dolci_mid": {},
    "r1_rs_sft": {"rs": 0.7, "smoltalk": 0.255, "openthoughts_answers": 0.03, "openthoughts": 0.015},
    "dolci_rs_sft": {"rs": 0.7, "dolci_answers": 0.15, "smoltalk": 0.12, "dolci": 0.03},
}


def test_the_recipes_are_the_seeds_with_its_shares() -> None:
    assert names() == sorted(SHARES)
    for name, shares in SHARES.items():
        found = resolve(name, {})
        assert {s.name: s.share for s in found.sources if s.share is not None} == pytest.approx(shares), name
        assert [s.name for s in found.sources if s.is_validation][:1] == ["smoltalk_test"], name
        assert told(found, {})[0].startswith(f"recipe {name}, by rows, seed 42")


def test_parameters_change_what_they_name_and_the_rest_follows() -> None:
    mixed = {s.name: s for s in resolve("r1_ot_mixed", {"ot_stop": 1000, "chat_ratio": 0.5}).sources}
    assert mixed["openthoughts"].stop == 1000 and mixed["openthoughts"].share == 0.5 == mixed["smoltalk"].share
    assert {s.name: s.stop for s in resolve("r1_ot_mixed", {"gsm8k_stop": -1}).sources}["gsm8k"] == 0  # nanochat's all
    rs = {s.name: s.share for s in resolve("r1_rs_sft", {"chat_ratio": 0.5, "chat_ot_answer_ratio": 0.5}).sources}
    trace, answers = (s for s in resolve("r1_rs_sft", {}).sources if s.name.startswith("openthoughts"))
    assert trace.hub == answers.hub != ""  # one data set, two views of it
    assert rs["smoltalk"] == pytest.approx(0.5 * 0.45) and rs["rs"] == 0.5  # the chats stay half of all


def refusal(recipe: str, params: dict | None = None) -> str:
    with pytest.raises(UserMistake) as caught:
        resolve(recipe, params or {})
    return str(caught.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("sourcse: {a: {}}", "sourcse: unknown key (did you mean sources?"),
        ("sources: {a: {shares: 1}}", "sources.a.shares: unknown key (did you mean share?"),
        ("sources: {a: {stop: -2}}", "sources.a.stop: -2 is not a whole number from 0"),
        ("sources: {a: {view: answers_only}}", "sources.a.view: unknown view 'answers_only' (did you mean"),
        ("sources: {aa: {}, b: {files_of: ab}}", "sources.b.files_of: no source 'ab' (did you mean aa?"),
        ("sources: {a: {hub: nothing}}", "sources.a.hub: 'nothing' is no dataset"),
        ("sources: {a: {share: 1.5}}", "sources.a.share: 1.5 is no share"),
        ("sources: {a: {share: 0.5}}", "sources: one source has `share: rest`, which sets the measure of the others"),
        ("sources: {a: {share: rest}, b: {share: rest}}", "a, b have it"),
        ("sources: {a: {share: rest}, b: {share: 0.6}, c: {share: 0.4}}", "the other shares are 1 together"),
        ("params: {p: 1}\nsources: {a: {stop: '${q}'}}", "sources.a.stop: '${q}' is no parameter (known: p)"),
        ("params: {p: 1}\nsources: {a: {stop: '${p}0'}}", "a parameter stands alone"),
        ("by: words\nsources: {a: {}}", "by: unknown value 'words' (known: rows, tokens)"),
        ("sources: {a: {where: {category: short}}}", "where: {'category': 'short'} is not a mapping of columns"),
        ("validation: {a: {}}", "sources: there are none"),
        ("sources: {a: {}, b: {}}\nvalidation: {a: {}}", "validation: each of a stands once"),
        ("params: {p: }\nsources: {a: {stop: '${p}'}}", "params.p: has no default, which says what may stand there"),
        ("seed: 1.5\nsources: {a: {}}", "seed: 1.5 is not a whole number"),
        ("sources: {a: {}}\nvalidation: {b: {held_out: 3}}", "held_out: is for a source that is trained on"),
        ("[a]", "a recipe is a mapping of about"),
        ("sources: {a: {}, a: {}}", "not valid YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_recipe_is_told_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    assert said in refusal(str(tmp_path / "own.yaml"))


def test_unknown_recipes_parameters_and_sources_are_refused_with_the_nearest(tmp_path: Path) -> None:
    assert "unknown recipe 'r1_ot_mix' (did you mean r1_ot_mixed?" in refusal("r1_ot_mix")
    assert "no file" in refusal(str(tmp_path / "r1_ot.yaml"))
    said = refusal("r1_ot_mixed", {"chat_ration": 0.2, "ot_stop": "many", "chat_by": 3})
    assert (
        "recipe_params.chat_ration: recipe r1_ot_mixed has no parameter of this name (did you mean chat_ratio?" in said
    )
    assert "recipe_params.ot_stop: 'many' is no whole number such as 1000000" in said and len(said.splitlines()) == 3
    assert refusal("r1_ot", {"ot_stop": 1e6}).endswith("1000000.0 is no whole number such as 500000; write 1000000")
    for params, wanted in (
        ({"chat_ratio": 1.5}, "1.5 is no share from 0 to below 1, nor `rest` (sources.smoltalk.share of recipe"),
        ({"ot_stop": -5}, "-5 is not a whole number from 0 (sources.openthoughts.stop of recipe r1_ot_mixed)"),
        ({"chat_by": "words"}, "unknown value 'words' (known: rows, tokens) (by of recipe r1_ot_mixed)"),
    ):  # fmt: skip
        assert refusal("r1_ot_mixed", params).startswith(f"recipe_params.{next(iter(params))}: {wanted}")
    with pytest.raises(UserMistake, match=r"recipe_sources.smoltak: .* \(did you mean smoltalk\?"):
        unread(resolve("r1_ot_mixed", {}), {"smoltak": Files(["a"])})
    assert unread(resolve("r1_ot", {}), {"dolci": Files(["a"]), "smoltalk": Files([])}) == ["dolci"]


# -- the draw ---------------------------------------------------------------------------------------------------------

a_recipe = st.builds(
    lambda by, seed, share, stop, held: Recipe("r", seed, by, "report", (
        RecipeSource("val", stop=5, is_validation=True),
        RecipeSource("base", stop=stop, share=1 - share, is_rest=True, held_out=held),
        RecipeSource("chat", share=share), RecipeSource("more"),
    )),
    st.sampled_from(["rows", "tokens"]), st.integers(0, 3), st.sampled_from([0.05, 0.3, 0.5]),
    st.sampled_from([0, 3, 40]), st.integers(0, 4),
)  # fmt: skip


@settings(max_examples=60)
@given(a_recipe, st.integers(0, 1 << 30))
def test_the_draw_keeps_to_its_shares_and_does_not_depend_on_the_order_of_rows(recipe: Recipe, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 300))
    source_of, tokens = rng.integers(0, 4, rows), rng.integers(1, 50, rows)
    hashes, first = rng.integers(0, 1 << 63, (rows, 2), dtype=np.uint64), rng.random(rows) < 0.9
    fate, table, short = draw(recipe, source_of, hashes, tokens, first)
    order = rng.permutation(rows)
    again, _, _ = draw(recipe, source_of[order], hashes[order], tokens[order], first[order])
    assert np.array_equal(again, fate[order])
    kept = {name: (source_of == n) & (fate == KEPT) for n, name in enumerate(("val", "base", "chat", "more"))}
    assert not kept["val"].any() and not (fate[(source_of == 3) & first] == NOT_DRAWN).any()
    held = [int(((source_of == n) & (fate == VALIDATION)).sum()) for n in range(4)]
    there = [int(((source_of == n) & first).sum()) for n in range(4)]
    _, base_source, chat_source, _ = recipe.sources
    assert held[0] == min(5, there[0]) and held[1] == min(base_source.held_out, there[1]) and held[2:] == [0, 0]
    base_has = there[1] - held[1]
    assert kept["base"].sum() == min(base_source.stop or base_has, base_has)
    measure = kept["base"].sum() if recipe.by == "rows" else tokens[kept["base"]].sum()
    got = kept["chat"].sum() if recipe.by == "rows" else tokens[kept["chat"]].sum()
    has = there[2] if recipe.by == "rows" else tokens[(source_of == 2) & first].sum()
    wanted = measure * chat_source.share / base_source.share
    assert abs(got - min(wanted, has)) <= (1 if recipe.by == "rows" else 50)
    assert ("chat" in short) == (int(wanted + 1e-9) > has)
    assert sum(row[4] for row in table["rows"]) == int((fate == KEPT).sum())


def test_another_seed_draws_other_rows_and_a_share_that_cannot_be_filled_may_fail() -> None:
    source_of, tokens = np.zeros(100, dtype=int), np.ones(100, dtype=int)
    hashes, first = np.arange(200, dtype=np.uint64).reshape(100, 2), np.ones(100, bool)
    half = (RecipeSource("a", stop=50),)
    fates = [draw(Recipe("r", seed, "rows", "report", half), source_of, hashes, tokens, first)[0] for seed in (1, 2)]
    assert 10 < (fates[0] != fates[1]).sum() and all((fate == KEPT).sum() == 50 for fate in fates)
    sources = (RecipeSource("a", share=0.5, is_rest=True), RecipeSource("b", share=0.5))
    with pytest.raises(UserMistake, match="b is 100 rows short of its share; lower the stop"):
        draw(Recipe("r", 1, "rows", "fail", sources), source_of, hashes, tokens, first)


# -- views ------------------------------------------------------------------------------------------------------------


ASKED = {"role": "user", "content": "2+2?"}
MARKED = "<|begin_of_thought|>Two.<|end_of_thought|><|begin_of_solution|>4<|end_of_solution|>"  # OpenThoughts-114k's


def test_answers_alone_leave_no_thought_in_any_schema() -> None:
    rows = [
        {"problem": "2+2?", "deepseek_reasoning": "Two and two.", "deepseek_solution": "4"},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "<think>Two.</think>\n\n4"}]},
        {"messages": [ASKED, {"role": "assistant", "content": "4", "reasoning_content": "Two."}]},
        {"conversations": [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": MARKED}]},
    ]
    for row in rows:
        (conversation,) = read_record(View("answer_only").apply(row))
        assert [m["content"] for m in conversation.messages] == ["2+2?", "4"] and "wo" not in str(conversation), row
    untrained = {"role": "assistant", "content": "5", "weight": 0}
    kept = View("answer_only").apply({"messages": [*rows[2]["messages"], untrained]})
    assert read_record(kept)[0].untrained == {2}
    assert View("", {"category": ["short"]}).apply({"category": "code"}) is None


def test_a_question_with_choices_is_answered_by_its_letter() -> None:
    row = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    (conversation,) = read_record(View("choices").apply(row))
    assert conversation.messages[1]["content"] == "\\boxed{B}" and "B. b" in conversation.messages[0]["content"]


# -- materialize ------------------------------------------------------------------------------------------------------


def chat(question: str, answer: str, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def said(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Small files in the schemas of OpenThoughts3, smol-smoltalk, GSM8K, ARC and prepared Dolci-Think."""
    folder = tmp_path_factory.mktemp("sources")
    columns = {"difficulty": 5, "source": "ai2-adapt-dev/openmath-2-math", "domain": "math"}
    categories = ["short", "chat", "code", "reasoning"]
    rows: dict[str, list[dict]] = {
        "openthoughts": [
            {"conversations": said(f"Prove {n}", f"<think>So?</think>\n\n{n}"), **columns} for n in range(70)
        ],
        "smoltalk": [chat(f"Hello {n}", "Hi! " * (n % 9 + 1), source="smol-magpie-ultra") for n in range(60)],
        "gsm8k": [{"question": f"{n}+1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(9)],
        "smoltalk_test": [chat(f"Test {n}", "Yes.", source="smol-rewrite") for n in range(12)],
        "arc_test": [
            {"id": str(n), "question": f"Q {n}", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
            for n in range(5)
        ],
        "dolci": [
            chat(f"Do {n}", f"<think>Well.</think>done {n}", source="WildChat", category=categories[n % 4])
            for n in range(40)
        ],
        "rs": [chat(f"RS {n}", f"<think>So {n}.</think>{n}", prompt_id=f"p{n}", pass_rate=0.5) for n in range(21)],
    }
    rows["smoltalk_test"].append(rows["smoltalk"][1])  # which is not trained on, then
    files = {}
    for name, lines in rows.items():
        (folder / name).mkdir()
        halves = [lines[: len(lines) // 2], lines[len(lines) // 2 :]]
        for place, half in enumerate(halves):
            path = folder / name / f"train-{place:05d}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in half))
        files[name] = Files([str(path) for path in sorted((folder / name).iterdir())])
    return files


def config_of(tokenizer: Path, real: dict[str, Files], recipe: str, **params: object) -> Config:
    own = {name for source in resolve(recipe, {}).sources for name in (source.name, source.files_of)}
    return Config(
        recipe=recipe,
        recipe_params=params,
        recipe_sources={name: files for name, files in real.items() if name in own},
        tokenizer=str(tokenizer),
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("by", ["rows", "tokens"])
def test_the_mixed_recipe_has_its_chat_ratio_and_the_same_bytes_for_any_number_of_elements(
    tmp_path: Path, tokenizer: Path, real: dict[str, Files], by: str
) -> None:
    config = config_of(tokenizer, real, "r1_ot_mixed", ot_stop=49, chat_by=by, val_smoltalk_stop=7, val_arc_stop=3)
    one, facts = build(config, tmp_path, 1)
    many, again = build(config, tmp_path, 3)
    assert contents_of(many) == contents_of(one) and again == facts
    table = {row[0]: dict(zip(facts["recipe_table"]["columns"], row)) for row in facts["recipe_table"]["rows"]}
    assert table["openthoughts"]["rows"] == 49 and table["gsm8k"]["rows"] == 9
    if by == "rows":
        assert table["smoltalk"]["rows"] == 21 and table["smoltalk"]["of the mix"] == "30.00%"
        assert table["smoltalk"]["of its tokens"] != "30.00%"
    else:
        wanted = table["openthoughts"]["tokens"] * 3 / 7
        assert abs(table["smoltalk"]["tokens"] - wanted) <= Store(one).lengths.max()
        assert table["smoltalk"]["rows"] != 21
    assert facts["validation"]["rows"] == 10 == len(Store(one / "validation"))
    for folder in (one, one / "validation"):
        Balance.from_json(read_json(folder / "balance.json")).check()
    assert facts["kept"] == len(Store(one)) == sum(row["rows"] for row in table.values())
    trained = {tuple(words) for words in Store(one).row_hashes.tolist()}
    assert trained.isdisjoint({tuple(words) for words in Store(one / "validation").row_hashes.tolist()})


def contents_of(folder: Path) -> dict[str, object]:
    return {path.name: contents_of(path) if path.is_dir() else path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_a_validation_set_leaves_may_be_trained_on_and_what_it_takes_never(
    tmp_path: Path, tokenizer: Path, real: dict[str, Files]
) -> None:
    """The same file is both, with a stop; some of its rows stand there twice."""
    rows = [json.loads(line) for name in real["openthoughts"].inputs for line in open(name)]
    twice = tmp_path / "twice.jsonl"
    twice.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:9]]))
    sources = {"openthoughts": Files([str(twice)]), "smoltalk_test": Files([str(twice)])}
    config = Config(
        recipe="r1_ot", recipe_params={"val_smoltalk_stop": 30}, recipe_sources=sources, tokenizer=str(tokenizer)
    )
    store, facts = build(config, tmp_path, 2)
    assert (facts["kept"], facts["validation"]["rows"]) == (40, 30)
    hashes = [Store(folder).row_hashes.tolist() for folder in (store, store / "validation")]
    assert len({tuple(words) for words in hashes[0] + hashes[1]}) == 70


@pytest.mark.parametrize("recipe, params, kept", [
    ("r1_ot", {"ot_stop": 20}, {"openthoughts": 20}),
    ("dolci_mid", {"dolci_stop": 30}, {"dolci": 30}),
    ("r1_rs_sft", {"rs_stop": 14, "chat_ot_answer_ratio": 0.4, "chat_ot_trace_ratio": 0.2},
     {"rs": 14, "smoltalk": 2, "openthoughts_answers": 2, "openthoughts": 1}),
    ("dolci_rs_sft", {"chat_ratio": 0.5}, {"rs": 21, "dolci_answers": 10, "smoltalk": 8, "dolci": 2}),
])  # fmt: skip
def test_each_recipe_draws_from_files_in_the_real_schemas(
    tmp_path: Path, tokenizer: Path, real: dict[str, Files], recipe: str, params: dict, kept: dict
) -> None:
    store, facts = build(config_of(tokenizer, real, recipe, **params), tmp_path, 2)
    table = {row[0]: row[4] for row in facts["recipe_table"]["rows"] if row[4]}
    assert table == kept and facts["short"] == {}
    assert facts["recipe"]["name"] == recipe and facts["kept"] == sum(kept.values())


def test_a_source_of_a_recipe_is_a_source_of_packs_by_its_name(
    tmp_path: Path, tokenizer: Path, real: dict[str, Files]
) -> None:
    config = config_of(tokenizer, real, "r1_ot_mixed")
    store, _ = build(config, tmp_path, 2)
    out = tmp_path / "packs"
    out.mkdir()
    weights = {"openthoughts": 0.5, "smoltalk": 0.5, "gsm8k": 0}
    facts = pack(PackConfig(store=str(store), pack_length=512, weights=weights), out)
    assert facts["packs"] and phase.forecast(config, None)["sources"][0] == "validation/smoltalk_test/train-00000.jsonl"
    (problem,) = sources.check({"openthoughts": 1, "gsm8k": 0}, {}, ["openthoughts/a", "gsm8k/b", "smoltalk/a"])
    assert "source smoltalk/a has none" in problem.message


def test_what_a_recipe_came_to_is_in_the_key_and_neither_its_name_nor_its_words(tmp_path: Path) -> None:
    text = Path("data_tools/recipes/r1_ot.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text.replace("about: the cold start", "about: other words"))

    def key(recipe: str, **params: object) -> dict:
        settings = keyed_settings(Config, Config(tokenizer="t", recipe=recipe, recipe_params=params))
        assert "recipe_params" not in settings
        return settings

    assert key("r1_ot") == key(str(tmp_path / "own.yaml")) == key("r1_ot", ot_stop=500000)
    assert key("r1_ot") != key("r1_ot", ot_stop=1) and key("r1_ot") != key("dolci_hf")
    found = [entry[:2] for entry in inputs_of(Config, Config(recipe=str(tmp_path / "own.yaml")))]
    assert found == [("recipe", str(tmp_path / "own.yaml"))]  # a file is watched as inputs are
    assert not list(inputs_of(Config, Config(recipe="r1_ot")))


def test_all_data_sets_that_are_missing_are_told_at_once_with_how_they_are_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    problems = check(Config(tokenizer="t", recipe="dolci_rs_sft"))
    said = {problem.where: problem.message for problem in problems}
    assert set(said) == {
        f"recipe_sources.{name}.inputs" for name in ("rs", "dolci", "smoltalk", "smoltalk_test", "arc_test")
    }
    assert "hf download HuggingFaceTB/smol-smoltalk --repo-type dataset" in said["recipe_sources.smoltalk.inputs"]
    assert "chat.jsonl of a reject_filter phase" in said["recipe_sources.rs.inputs"]


@pytest.mark.parametrize("values, where", [
    ({"recipe": "r1_ot", "source": Source(inputs=["a"])}, "source"),
    ({"recipe": "r1_ot", "task": "calculator"}, "recipe"),
    ({"recipe_params": {"a": 1}, "source": Source(inputs=["a"])}, "recipe_params"),
    ({"recipe_sources": {"a": Files(["b"])}, "source": Source(inputs=["a"])}, "recipe_sources"),
])  # fmt: skip
def test_a_recipe_stands_alone(values: dict, where: str) -> None:
    assert where in [problem.where for problem in check(Config(tokenizer="t", **values))]


def test_rows_that_hold_an_evaluated_question_are_in_no_store(tmp_path: Path, tokenizer: Path) -> None:
    long = "a train leaves the old station at nine and needs three hours to reach the far northern coast"
    rows = [chat("Hi", "Hello"), chat(f"Say: {long}?", "Noon."), chat("So", f"Well, {long.upper()}")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "set.jsonl").write_text(json.dumps({"question": long}))
    source, sets = Source([str(tmp_path / "rows.jsonl")]), [str(tmp_path / "set.jsonl")]
    config = Config(source, tokenizer=str(tokenizer), evaluation_sets=sets)
    _, facts = build(config, tmp_path, 1)
    assert facts["kept"] == 1 and facts["buckets"] == {"contaminated": 2}
