"""The pipeline file: every mistake is found at once, named by file, key and value; references become needs."""

import itertools
import textwrap
from typing import get_type_hints

import pytest

from data_tools.base.declared import describe
from data_tools.mistake import UserMistake
from jobs.kind import find_kind, kind_names, shares_of_parts, wrong_makers
from jobs.schema.pipeline import load_pipeline
from jobs.schema.problems import Problems
from jobs.schema.references import references, substitute
from jobs.schema.typed import structured
from launchers.planning.planner import default_run_folder, make_plan
from launchers.submission.submit import resubmit
from slurm.detect import find_cluster
from tests.command import ROOT

GOOD = """
name: good
params: {start: 1, files: [a, b]}
phases:
  last:
    uses: tests.toy.total
    with: {numbers: "${phases.first.out}/x", factor: "${params.start}"}
    needs: [{middle: afterany}]
  first: {uses: tests.toy.numbers, array: 3, with: {start: "${params.start}"}}
  middle: {uses: tests.toy.numbers, array: [7, 8], needs: [{first: aftercorr}], resources: {time: 1:30:00}}
"""


def write(tmp_path, text):
    path = tmp_path / "p.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def problems(tmp_path, text, *overrides):
    with pytest.raises(UserMistake) as caught:
        load_pipeline(write(tmp_path, text), list(overrides))
    return [str(problem) for problem in caught.value.problems]


def test_a_reference_implies_an_afterok_need_and_phases_come_in_order(tmp_path):
    pipeline = load_pipeline(write(tmp_path, GOOD))
    assert list(pipeline.phases) == ["first", "middle", "last"]
    assert {(n.phase, n.type) for n in pipeline.phases["last"].needs} == {("middle", "afterany"), ("first", "afterok")}
    assert pipeline.phases["last"].settings["factor"] == 1
    settings = pipeline.phases["last"].settings
    assert references(settings) == {"first"}
    assert substitute(settings, {"first": "/run/first/KEY"})["numbers"] == "/run/first/KEY/x"
    assert pipeline.phases["middle"].elements == 2 and pipeline.phases["middle"].value(1) == 8


def test_an_unquoted_time_stays_a_time(tmp_path):
    assert load_pipeline(write(tmp_path, GOOD)).phases["middle"].resources.time == "1:30:00"
    overridden = load_pipeline(write(tmp_path, GOOD), ["middle.resources.time=2:00:00"])
    assert overridden.phases["middle"].resources.time == "2:00:00"


def test_overrides_are_typed_and_reach_every_part(tmp_path):
    overrides = ["first.with.start=5", "params.start=1e3", "middle.array=[1]", "name=other", "cluster=local"]
    with pytest.raises(UserMistake, match="factor.*1000.0"):  # 1e3 is a float, factor an int
        load_pipeline(write(tmp_path, GOOD), overrides)
    overrides[1] = "params.start=3"
    pipeline = load_pipeline(write(tmp_path, GOOD), overrides)
    assert (pipeline.name, pipeline.cluster) == ("other", "local")
    assert pipeline.phases["first"].settings["start"] == 5
    assert pipeline.phases["last"].settings["factor"] == 3
    assert pipeline.phases["middle"].array == [1]


def test_all_mistakes_are_reported_at_once_with_file_key_and_value(tmp_path):
    found = problems(
        tmp_path,
        """
        name: Bad Name
        parms: {}
        on_code_change: rerum
        phases:
          one: {uses: tests.toy.numbers, array: 0, with: {strt: 1, seconds: soon}, resources: {nodez: 2, nodes: two}}
          two: {uses: evaluat, needs: [onne, {one: afterko}]}
          six: {uses: tests.toy.total, array: 2, with: {numbers: "${phases.oen.out}", factor: "${params.nothing}"}}
          Seven: {uses: tests.toy.total}
          eight: {with: {}}
        """,
    )
    text = "\n".join(found)
    for expected in (
        "p.yaml: name: 'Bad Name'", "p.yaml: parms: unknown key (did you mean params?", "'rerum' (did you mean rerun?",
        "phases.one.array: 0 is neither", "phases.one.with.strt: unknown key (did you mean start?",
        "phases.one.with.seconds: 'soon' is not of type float",
        "phases.one.resources.nodez: unknown key (did you mean nodes?",
        "phases.one.resources.nodes: 'two' is not of type int | None",
        "phases.two.uses: unknown phase kind 'evaluat' (did you mean evaluate?",
        "phases.two.needs: no phase 'onne' (did you mean one?",
        "phases.two.needs.one: unknown dependency type 'afterko' (did you mean afterok?", "cannot be split",
        "no phase 'oen' (did you mean one?", "cannot resolve '${params.nothing}'",
        "phases.Seven: 'Seven' is not a phase name", "phases.eight.uses: missing",
    ):  # fmt: skip
        assert expected in text, f"{expected!r} not in:\n{text}"
    assert all("\n" not in line for line in found)


@pytest.mark.parametrize("misplaced", [[{"a": "b"}], [["a"]], {"a": "b"}, [1, {"a": "b"}]], ids=str)
@pytest.mark.parametrize("kind", ["decontaminate", "materialize", "reject_filter", "generate", "dolci_prepare"])
def test_a_list_or_mapping_in_the_place_of_another_or_of_a_text_is_refused(kind, misplaced):
    """Sweep the lists of texts of a kind of phase, and one inside its mix."""
    schema = find_kind(kind).config
    lists = [name for name, hint in get_type_hints(schema).items() if hint == list[str]]
    assert lists or kind == "generate"
    for name in [*lists, *(["mix"] if "mix" in get_type_hints(schema) else [])]:
        noted = Problems("p.yaml")
        value = {"entries": {"svamp": {"source": {"inputs": misplaced}}}} if name == "mix" else misplaced
        structured(noted, "with", schema, {name: value})
        assert any(f"with.{name}" in str(problem) and "is not of type" in str(problem) for problem in noted.noted)


@pytest.mark.parametrize("body", [
    "array: ['${phases.first.out}', 2]", "resources: {partition: '${phases.first.out}'}",
    "throttle: ${phases.first.out}",
    "needs: [{'${phases.first.out}': afterok}]",
])  # fmt: skip
def test_a_reference_to_a_phase_stands_in_with_alone(tmp_path, body):
    text = "\n".join(
        problems(
            tmp_path,
            f"""
            phases:
              first: {{uses: tests.toy.numbers}}
              second:
                uses: tests.toy.numbers
                {body}
            """,
        )
    )
    assert f"phases.second.{body.split(':')[0]}: refers to the output of first, which only `with` can" in text


FOREIGN = [
    "${oc.env:SECRET}",
    "${oc.decode:${oc.env:SECRET}}",
    "x ${ oc.env : SECRET } y",
    "${oc.create:{a: 1}}",
    "${oc.select:params.start}",
    "${oc.dict.keys:params}",
    "${custom:1}",
    "${params.start:1}",
    "${.start}",
    "\\\\${oc.env:SECRET}",
    "${${params.oc}:SECRET}",
    "${params.${oc.env:SECRET}}",
    "${leaf.value}",
    "${params.dollar}{oc.env:SECRET}",
    "${oc.env:SECRET",
    "???",
]


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("place", ["params.start", "first.with.start", "last.needs", "first.resources.time"])
def test_a_pipeline_refers_to_parameters_and_phases_alone(tmp_path, monkeypatch, text, place):
    monkeypatch.setenv("SECRET", "hunter22")
    pipeline = GOOD.replace("files: [a, b]", 'files: [a, b], oc: oc.env, dollar: "$"')
    for value in (f'"{text}"', f'["{text}"]', f'{{"{text}": 1}}'):
        found = problems(tmp_path, pipeline, f"{place}={value}")
        assert any("is no reference" in line or "cannot resolve" in line or "is missing" in line for line in found), (
            found
        )
        assert not any("hunter22" in line for line in found)


def test_references_stand_in_keys_too_and_two_that_become_one_are_refused(tmp_path):
    text = """
        name: keys
        params: {one: a.jsonl}
        phases:
          first: {uses: tests.toy.numbers}
          packs: {uses: pack, with: {store: s, weights: {"${phases.first.out}/b.jsonl": 1, "${params.one}": 2}}}
        """
    packs = load_pipeline(write(tmp_path, text)).phases["packs"]
    assert [need.phase for need in packs.needs] == ["first"]
    assert substitute(packs.settings, {"first": "/run"})["weights"] == {"/run/b.jsonl": 1, "a.jsonl": 2}
    assert any(
        "stands there already" in line
        for line in problems(tmp_path, text.replace("${phases.first.out}/b.jsonl", "a.jsonl"))
    )


def test_cycles_are_found_at_any_depth(tmp_path):
    phases = "".join(f"  p{i}: {{uses: tests.toy.total, needs: [p{(i + 1) % 15}]}}\n" for i in range(15))
    found = problems(tmp_path, "name: c\nphases:\n" + phases)
    assert len(found) == 1 and "cycle: p0 -> p1 -> " in found[0] and found[0].count("->") == 15


@pytest.mark.parametrize("override, expected", [
    ("nope.with.x=1", "no phase 'nope'"), ("params.strt=1", "did you mean start?"),
    ("first.with.start", "dotted.key=value"), ("first.with.start=[", "not valid YAML"),
    ("first.with.start=x", "override first.with.start: 'x' is not of type int"),
    ("first.with.start=null", "first.with.start: null is not of type int (write a value; the default is 0)"),
])  # fmt: skip
def test_a_wrong_override_is_named(tmp_path, override, expected):
    assert any(expected in line for line in problems(tmp_path, GOOD, override))


@pytest.mark.parametrize("text, expected", [
    ("name: [", "not valid YAML"), ("- a", "a pipeline is a mapping"), ("name: x\nname: y", "stands twice"),
    ("name: x", "phases"), ('name: "x\\n"\nphases: {}', "is not a pipeline name"),
])  # fmt: skip
def test_a_broken_file_is_one_line(tmp_path, text, expected):
    found = problems(tmp_path, text)
    assert expected in found[0] and "\n" not in found[0]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserMistake, match="no such pipeline file"):
        load_pipeline(tmp_path / "none.yaml")
    for name in ("tiny", "jobs/pipelines/tiny.yaml"):  # as the manual says, in a folder without a checkout
        with pytest.raises(UserMistake, match="no such pipeline file; the one that comes .*/jobs/pipelines/tiny.yaml$"):
            load_pipeline(tmp_path / name)


def test_snapshots_carry_the_modules_of_users_tasks():
    from data_tools.tasks.mix import Entry, MixConfig
    from jobs.kind import user_code
    from jobs.phases.generate import Config

    config = Config(mix=MixConfig({"gsm8k": Entry(), "mine": Entry("tests.data_tools.tasks.verifiers:length")}))
    assert [root.name for root in user_code("generate", config)] == ["tests"]


def test_an_override_below_a_mapping_of_the_params_changes_that_one_value_of_its_phase(tmp_path):
    """`grpo.with.mix.entries.gsm8k.weight=0.6` keeps the entry's task and files, whatever the order of overrides."""
    text = """
name: p
params: {gsm8k: {task: gsm8k, hub: openai/gsm8k, weight: 0.45}}
phases:
  a: {uses: decontaminate, with: {mix: {entries: {gsm8k: "${params.gsm8k}"}}}}
  b: {uses: decontaminate, with: {mix: {entries: {gsm8k: "${params.gsm8k}"}}}}
"""
    for overrides in itertools.permutations(["a.with.mix.entries.gsm8k.weight=0.6", "params.gsm8k.hub=own/gsm8k"]):
        phases = load_pipeline(write(tmp_path, text), list(overrides)).phases.values()
        entries = [phase.config.mix.entries["gsm8k"] for phase in phases]
        assert [entry.weight for entry in entries] == [0.6, 0.45]
        assert {(entry.task, entry.hub) for entry in entries} == {("gsm8k", "own/gsm8k")}


def test_an_override_changes_one_phase_of_those_that_share_an_anchor(tmp_path):
    text = """
name: p
phases:
  a: {uses: decontaminate, with: {mix: &mix {entries: {one: &one {task: gsm8k, hub: openai/gsm8k}, two: *one}}}}
  b: {uses: decontaminate, with: {mix: *mix}, resources: &cpu {role: cpu}}
  c: {uses: decontaminate, with: {mix: {entries: {one: *one}}}, resources: *cpu}
"""
    overrides = ["b.with.mix.entries.one.weight=0.5", "c.resources.nodes=2"]
    phases = load_pipeline(write(tmp_path, text), overrides).phases
    weights = {name: [entry.weight for entry in phase.config.mix.entries.values()] for name, phase in phases.items()}
    assert weights == {"a": [1.0, 1.0], "b": [0.5, 1.0], "c": [1.0]}
    assert phases["b"].resources.nodes != 2 == phases["c"].resources.nodes


WHEN = """
name: p
params: {wanted: false, folder: "${phases.extra.out}"}
phases:
  a: {uses: tests.toy.numbers, with: {start: 1}}
  extra: {uses: tests.toy.numbers, with: {start: 2}, needs: [a], when: "${params.wanted}"}
  more: {uses: tests.toy.total, with: {numbers: "${phases.extra.out}"}, when: "${params.wanted}"}
"""


def test_a_phase_whose_when_is_false_is_left_out_and_nothing_may_count_on_it(tmp_path):
    assert list(load_pipeline(write(tmp_path, WHEN)).phases) == ["a"]
    assert list(load_pipeline(write(tmp_path, WHEN), ["params.wanted=true"]).phases) == ["a", "extra", "more"]
    assert list(load_pipeline(write(tmp_path, WHEN), ["extra.when=true"]).phases) == ["a", "extra"]
    needing = WHEN + "  needing: {uses: tests.toy.numbers, needs: [{extra: afterany}]}\n"
    reading = WHEN + '  reading: {uses: tests.toy.total, with: {numbers: "${params.folder}/x"}}\n'
    for text, overrides, expected in (
        (WHEN, ["extra.with.start=3"], "override extra.with.start: phase extra is left out: its `when` is false"),
        (WHEN, ["more.when=true"], "phases.more.with: refers to phase extra, which is left out: its `when` is false"),
        (needing, [], "phases.needing.needs: phase extra is left out: its `when` is false"),
        (reading, [], "phases.reading.with: refers to phase extra, which is left out: its `when` is false"),
        (WHEN, ["params.wanted=1"], "phases.extra.when: 1 is neither true nor false"),
        (WHEN, ["extra.when='${params.wnated}'"], "there is no params.wnated (did you mean wanted?"),
        (WHEN, ["a.when=false"], "phases: each is left out: its `when` is false"),
    ):  # fmt: skip
        found = problems(tmp_path, text, *overrides)
        assert any(expected in line for line in found), found
        assert len(found) == len(set(found))
    pipeline = load_pipeline(write(tmp_path, WHEN))
    plan = make_plan(pipeline, default_run_folder(pipeline, tmp_path / "run"), find_cluster("local"))
    assert plan.notes == ["left out, since `when` is false: extra, more"]
    with pytest.raises(UserMistake, match="phase more is left out, since its `when` is false; set that, too"):
        resubmit(plan, "more", dry_run=True)


@pytest.mark.parametrize("uses, setting, value", [
    ("tests.toy.numbers", "mistake", "%s"), ("q_rewards", "inputs", "[a, %s]"),
    ("dolci_prepare", "sources", "{code: [%s]}"),
])  # fmt: skip
def test_what_yaml_reads_as_no_text_is_no_text_in_silence(tmp_path, uses, setting, value):
    """A tag 3.10 would be 3.1, and off False."""
    text = "name: t\nphases: {a: {uses: %s, with: {%s: %s}}}"
    for written in ("off", "yes", "3.10", "1e3"):
        with pytest.raises(
            UserMistake, match=f"with.{setting}: .*YAML reads it as no text: put what you mean in quotes"
        ):
            load_pipeline(write(tmp_path, text % (uses, setting, value % written)))
        load_pipeline(write(tmp_path, text % (uses, setting, value % f"'{written}'")))


def test_a_date_is_a_text_and_what_json_lacks_is_refused_wherever_it_stands(tmp_path):
    text = "name: t\nparams: {day: 2026-01-01, x: 1}\nphases: {a: {uses: tests.toy.numbers, array: [2026-01-01, 2]}}"
    found = load_pipeline(write(tmp_path, text))
    assert found.params["day"] == "2026-01-01" == found.phases["a"].array[0]
    for odd in ("!!set {a}", "!!binary YQ==", "!!timestamp '2026-01-01'", "!!omap [a: 1]"):
        for override in (f"params.x={odd}", f"a.array=[{odd}]", f"a.with.start={odd}"):
            with pytest.raises(UserMistake, match="give a text, a number, a list or a mapping"):
                load_pipeline(write(tmp_path, text), [override])


@pytest.mark.parametrize("override, said", [
    ("params.names.0=b", "override params.names.0: params.names is ['a'], which has no '0'; give all of it"),
    ("params.one.x=1", "override params.one.x: params.one is 5, which has no 'x'; give all of it"),
    ("a.array.0=1", "override a.array.0: a.array is [1, 2], which has no '0'; give all of it"),
    ("a.with.start.x=1", "override a.with.start.x: a.with.start is 5, which has no 'x'; give all of it"),
    ("a.throttle=true", "override a.throttle: True is not a number of elements"),
    ("a.array=100000000", "override a.array: 100,000,000 elements are more than 1,000,000, the most"),
])  # fmt: skip
def test_an_override_leads_into_nothing_but_mappings(tmp_path, override, said):
    text = """
        name: t
        params: {names: [a], one: 5}
        phases: {a: {uses: tests.toy.numbers, array: [1, 2], with: {start: "${params.one}"}}}
    """
    with pytest.raises(UserMistake) as caught:
        load_pipeline(write(tmp_path, text), [override])
    assert str(caught.value).startswith(said) and len(str(caught.value).splitlines()) == 1


def wrong(path, overrides=()):
    pipeline = load_pipeline(path, list(overrides))
    uses = {name: phase.uses for name, phase in pipeline.phases.items()}
    return [
        f"{phase.name}.{problem}"
        for phase in pipeline.phases.values()
        for problem in wrong_makers(phase.kind, phase.config, uses)
    ]


def test_a_phase_that_makes_no_such_thing_is_no_input():
    for path in (ROOT / "jobs" / "pipelines").glob("*.yaml"):
        assert wrong(path) == [], path.name
    makers = {"model": "import_hf or sft or grpo or merge_lora", "store": "materialize", "packs": "pack"}
    swapped = [
        ("sft.model", "data", "materialize", "model"), ("sft.store", "packs", "pack", "store"),
        ("sft.packs", "data", "materialize", "packs"), ("sft.valid_stores", "imported", "import_hf", "store"),
        ("packs.store", "init", "init_model", "store"), ("grpo.model", "init", "init_model", "model"),
        ("grpo.reference", "packs", "pack", "model"), ("exported.model", "data", "materialize", "model"),
        ("trained.model", "init", "init_model", "model"), ("trained.seen_in", "imported", "import_hf", "store"),
    ]  # fmt: skip
    overrides = []
    for key, phase, _, _ in swapped:
        value = f"'${{phases.{phase}.out}}'"
        overrides.append(f"{key.replace('.', '.with.')}={f'[{value}]' if key.endswith('stores') else value}")
    told = wrong(ROOT / "jobs" / "pipelines" / "tiny.yaml", overrides)
    assert sorted(told) == sorted(
        f"{key}: phase {phase} uses {uses}, which makes no such thing; {makers[wanted]} does"
        for key, phase, uses, wanted in swapped
    )


@pytest.mark.parametrize("uses, settings, key", [
    ("materialize", "source: {inputs: [PART]}", "source.inputs"), ("dolci_prepare", "inputs: [PART]", "inputs"),
    ("decontaminate", "inputs: [PART]", "inputs"), ("generate", "model: PART", "model"),
    ("reject_filter", "inputs: [PART]", ""), ("tests.toy.numbers", "file: PART", ""),
])  # fmt: skip
def test_no_kind_of_ours_takes_a_share_of_what_is_one_elements_part_alone(tmp_path, uses, settings, key):
    """As an array each takes a share of every file; what a user's own does nobody knows."""
    settings = settings.replace("PART", "'${phases.a.out}/rows.jsonl'")
    text = f"""
        name: t
        phases:
          a: {{uses: decontaminate, array: 2, with: {{inputs: [rows.jsonl], evaluation_sets: [asked.jsonl]}}}}
          b: {{uses: {uses}, array: 2, needs: [{{a: aftercorr}}], with: {{{settings}}}}}
    """
    phase = load_pipeline(write(tmp_path, text)).phases["b"]
    assert not list(shares_of_parts(phase.kind, phase.config, []))
    part = f"{key}: aftercorr gives each element its partner's part of a alone, which {uses} would take for all of it"
    expected = [f"{part}; say afterok: then its elements share all that a made"] if key else []
    assert [str(problem) for problem in shares_of_parts(phase.kind, phase.config, ["a"])] == expected


def test_a_reference_in_our_own_spelling_is_refused(tmp_path):
    (tmp_path / "p.yaml").write_text("name: t\nphases: {a: {uses: pack, with: {store: '@{phases.zz.out}'}}}\n")
    with pytest.raises(UserMistake, match="@.phases.zz.out.' is afterok's own spelling; write ..phases.zz.out."):
        load_pipeline(tmp_path / "p.yaml")


def test_an_unknown_key_within_a_mapping_of_settings_is_told_as_any_other():
    """Of the mappings and lists of dataclasses in a kind's settings, each element is looked at by itself."""
    noted = Problems("p.yaml")
    entries = {"capitals": {"task_options": {"loud": True}, "weight": "much", "limit": 4}, "sums": {"task": "svamp"}}
    config = structured(noted, "with", find_kind("generate").config, {"mix": {"entries": entries}})
    told = [str(problem) for problem in noted.noted]
    assert told[0].startswith("p.yaml: with.mix.entries.capitals.task_options: unknown key (did you mean options?")
    assert told[1].startswith("p.yaml: with.mix.entries.capitals.weight: 'much' is not of type float") and not told[2:]
    assert config.mix.entries["capitals"].limit == 4 and config.mix.entries["sums"].task == "svamp"


def test_a_key_that_another_kind_has_is_told_with_what_this_one_has_in_its_place():
    """Every such key is one of another kind's settings, and none of its own."""
    kinds = {name: find_kind(name) for name in kind_names()}
    keys = {
        name: {part for each in describe(kind.config) for part in each.key.split(".")} for name, kind in kinds.items()
    }
    for kind in kinds.values():
        for key, told in kind.elsewhere.items():
            noted = Problems("p.yaml")
            structured(noted, "with", kind.config, {key: 1}, elsewhere=kind.elsewhere)
            assert [str(problem) for problem in noted.noted][0] == f"p.yaml: with.{key}: unknown key: {told}"
            assert key not in get_type_hints(kind.config) and any(key in keys[other] for other in kinds)
    assert kinds["grpo"].elsewhere["log_every"] == "grpo logs every step"
