"""Engines that are not ours: what is recorded, gone on with and refused, with a stand-in of vLLM's signatures.

The real one, where it is installed: tests/vllm.
"""

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from data_tools.base import durable
from data_tools.mistake import UserMistake
from data_tools.progress import Stopped
from data_tools.tasks.mix import Entry, MixConfig
from data_tools.tasks.task import Source
from jobs.kind import find_kind, keyed_settings
from jobs.phases import generate as samples
from jobs.sealing import Told
from jobs.task import Task
from launchers.observe import show
from megatron_ext.entrypoints import evaluate, generate
from megatron_ext.foreign import exports, vllm_arguments, vllm_limits
from megatron_ext.foreign.maker import seed_of
from megatron_ext.foreign.vllm_engine import EngineDied
from megatron_ext.model_folders.model_folder import open_folder
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.rl import generation, journal
from megatron_ext.rollout.settings import EngineConfig, Sampling
from tests.megatron_ext import vllm_stand_in
from tests.megatron_ext.vllm_stand_in import LLM, Core

PROMPTS, SAMPLES = 7, 3


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """vLLM's stand-in, in place of the package; the engines that are started."""
    for name, module in vllm_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(LLM, "started", [])
    return LLM.started


def config(calculator, **changes) -> generate.Config:
    source = Source(synthetic_rows=40, synthetic_split="heldout")
    mix = MixConfig({"sums": Entry("calculator", source=source, limit=PROMPTS)})
    values = {"samples": SAMPLES, "sampling": Sampling(max_tokens=6), "seed": 3, "verifiers": 1, "chunk": 5,
              "backend": "vllm", "record_s": 1e-9, **changes}  # fmt: skip
    return generate.Config(model=str(calculator["base"]), mix=mix, **values)


def run(asked, root, **told):
    for name in ("out", "keep"):
        (root / name).mkdir(parents=True, exist_ok=True)
    facts = generate.run(asked, root / "out", root / "keep", **told)
    return facts, (root / "out" / "samples.jsonl").read_text()


def keys(requests):
    return [(tuple(request.prompt), request.params.seed) for request in requests]


def test_samples_of_a_foreign_engine_are_written_as_ours_are(calculator, tmp_path, stand_in):
    facts, text = run(config(calculator), tmp_path)
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["place"], row["sample"]) for row in rows] == [(p, s) for p in range(PROMPTS) for s in range(SAMPLES)]
    assert facts["engine"] == {"is": "vllm", "version": "0.32.0"} and facts["samples"] == len(rows)
    assert {row["finish"] for row in rows} <= {"stop", "length"} and all(0 < row["tokens"] <= 6 for row in rows)
    seeds = {request.params.seed for request in stand_in[0].llm_engine.asked}
    assert len(seeds) == len(rows) and all(0 <= seed < 2**53 for seed in seeds)


def test_what_an_engines_death_interrupts_goes_on_without_a_double_or_a_loss(
    calculator, tmp_path, stand_in, monkeypatch
):
    _, expected = run(config(calculator), tmp_path / "whole")
    start = LLM.__init__

    def dying(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.llm_engine.dies_after = 3

    monkeypatch.setattr(LLM, "__init__", dying)
    with pytest.raises(EngineDied, match="sampling engine died: vLLM: EngineDeadError: EngineCore encountered"):
        run(config(calculator), tmp_path / "cut")
    (root,) = (tmp_path / "cut" / "keep").glob("element_*/rollouts")
    recorded = {key for key, entry in journal.read(root, 0).items() if entry.finish}
    assert 0 < len(recorded) < 5 * SAMPLES
    monkeypatch.setattr(LLM, "__init__", start)
    _, text = run(config(calculator), tmp_path / "cut")
    assert text == expected
    again = keys(stand_in[-1].llm_engine.asked)
    assert len(again) == len(set(again)) == PROMPTS * SAMPLES - len(recorded)


def test_the_end_of_an_engines_own_process_ends_the_wait_for_its_step(calculator, tmp_path, monkeypatch):
    start = LLM.__init__

    def dying(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.llm_engine.dies_after = 2

    monkeypatch.setattr(LLM, "core", Core)
    monkeypatch.setattr(LLM, "__init__", dying)
    with pytest.raises(EngineDied, match="sampling engine died: vLLM: EngineDeadError"):
        run(config(calculator), tmp_path)


def test_a_stop_is_obeyed_between_steps_and_what_was_drawn_is_recorded(calculator, tmp_path, stand_in):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 4

    with pytest.raises(Stopped) as stopped:
        run(config(calculator), tmp_path, stop=stop)
    assert 0 < stopped.value.done < PROMPTS and not stand_in[0].llm_engine.requests
    _, text = run(config(calculator), tmp_path)
    assert text == run(config(calculator), tmp_path / "whole")[1]


def test_a_completion_ends_with_the_token_that_completes_a_stop_string(calculator, tmp_path, stand_in):
    plain = [json.loads(line) for line in run(config(calculator), tmp_path / "plain")[1].splitlines()]
    stop = next(row["completion"][:2] for row in plain if len(row["completion"]) >= 3)
    sampling = Sampling(max_tokens=6, stop_strings=[stop])
    rows = [json.loads(line) for line in run(config(calculator, sampling=sampling), tmp_path)[1].splitlines()]
    for before, after in zip(plain, rows):
        at = before["completion"].find(stop)
        assert after["completion"] == (before["completion"] if at < 0 else before["completion"][: at + len(stop)])
        assert at < 0 or after["finish"] == "stop"
    assert stand_in[-1].llm_engine.aborted


def test_the_model_is_exported_once_for_all_elements_and_goes_with_the_phase(calculator, tmp_path, stand_in):
    phase, asked = tmp_path / "phase", config(calculator)
    elements = [(tmp_path / f"out{index}", phase / "elements" / str(index)) for index in range(2)]
    for index, (out, keep) in enumerate(elements):
        task = Task("p", index, 2, value=None, out=out, keep=keep, rank=0, world_size=1)
        out.mkdir()
        keep.mkdir(parents=True)
        samples.run(asked, task)
    assert len({llm.model for llm in stand_in}) == 1 and len(stand_in) == 2
    assert [path.parent for path in (phase / "exported").iterdir()] == [phase / "exported"]
    (tmp_path / "out").mkdir()
    joined = generate.finish(asked, [out for out, _ in elements], tmp_path / "out", phase)
    assert joined["samples"] == PROMPTS * SAMPLES and not (phase / "exported").exists()


def test_two_that_export_the_same_model_at_once_do_no_harm(calculator, tmp_path, monkeypatch):
    folder, fsync = open_folder(str(calculator["base"])), durable.fsync_tree
    first = exports.exported(folder, "", tmp_path / "alone")

    def meanwhile(own):  # another one, who took the lock for dead, is done first
        fsync(own)
        shutil.copytree(first, tmp_path / "both" / exports.EXPORTED / first.name)

    monkeypatch.setattr(durable, "fsync_tree", meanwhile)
    made = exports.exported(folder, "", tmp_path / "both")
    assert made.name == first.name and [path.name for path in made.parent.iterdir()] == [first.name]


def test_an_evaluation_asks_one_engine_for_answers_samples_and_choices(calculator, tmp_path, stand_in):
    asked = evaluate.Config(
        model=str(calculator["base"]), task="calculator", source=Source(synthetic_rows=9), max_new_tokens=4,
        samples=2, backend="vllm", verifiers=1,
    )  # fmt: skip
    for name in ("out", "keep"):
        (tmp_path / name).mkdir()
    facts = evaluate.run(asked, tmp_path / "out", tmp_path / "keep")
    assert facts["engine"]["is"] == "vllm" and len(stand_in) == 1
    temperatures = {request.params.temperature for request in stand_in[0].llm_engine.asked}
    assert temperatures == {0, 1.0}


def test_an_evaluation_that_is_asked_to_stop_goes_on_without_asking_twice(calculator, tmp_path, stand_in):
    source = Source(synthetic_rows=9)
    asked = evaluate.Config(
        model=str(calculator["base"]), source=source, max_new_tokens=6, samples=2, backend="vllm", verifiers=1
    )

    def run(root, **told):
        for name in ("out", "keep"):
            (root / name).mkdir(parents=True, exist_ok=True)
        evaluate.run(asked, root / "out", root / "keep", **told)
        return [(root / "out" / name).read_text() for name in ("samples.jsonl", "result.json")]

    looks = itertools.count()
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop=lambda: next(looks) > 3)
    before = len(keys(stand_in[-1].llm_engine.finished))
    assert run(tmp_path / "cut") == run(tmp_path / "whole")
    whole, after = (keys(llm.llm_engine.asked) for llm in (stand_in[-1], stand_in[-2]))
    assert 0 < before and len(after) == len(whole) - before


def test_the_seal_of_a_phase_tells_whose_samples_its_elements_are():
    kinds = [find_kind(name).of_elements for name in ("generate", "evaluate")]
    assert kinds == [("engine",), ("engine",)]
    told, mixed = Told(("engine",)), Told(("engine",))
    for version in ("1", "1", "2"):
        mixed.add({"engine": {"is": "vllm", "version": version}, "samples": 3})
    for _ in range(2):
        told.add({"engine": {"is": "openai", "url": "http://a/v1", "model": "m"}})
    assert mixed.facts() == {"engine": [{"is": "vllm", "version": "1"}, {"is": "vllm", "version": "2"}]}
    assert Told(("engine",)).facts() == {} and told.facts()["engine"]["is"] == "openai"
    lines = [show.headline({"headline": "3 samples", **one.facts()}) for one in (told, mixed)]
    assert lines == ["3 samples; by m at http://a/v1", "3 samples; by vllm 1, vllm 2"]
    assert show.headline({"headline": "3 samples", "engine": {"is": "afterok"}}) == "3 samples"


def test_seeds_are_those_of_run_prompt_and_sample():
    cases = [(seed, uid, number) for seed in (0, 1, -5) for uid in (0, 1, 2**40) for number in (0, 1)]
    seeds = [seed_of(*case) for case in cases]
    assert len(set(seeds)) == len(cases) and seeds == [seed_of(*case) for case in cases]
    assert seed_of(0, 0, 0) == 2610508678112439  # a restart under a later version draws the same


REFUSED = {
    "vllm.max_num_seq": dict(vllm={"max_num_seq": 4}),
    "vllm.dtype": dict(vllm={"dtype": "half"}),
    "vllm.hf_token": dict(vllm={"hf_token": "abc"}),
    "vllm.load_format": dict(vllm={"load_format": "dummy"}),
    "vllm.data_parallel_rank": dict(vllm={"data_parallel_rank": 0}),
    "engine.kv_gib": dict(engine=EngineConfig(kv_gib=3)),
    "base": dict(base="mxfp4"),
    "parallel.context": dict(parallel=ParallelPlan(context=2)),
    "sampling.min_p": dict(sampling=Sampling(max_tokens=6, min_p=0.1, top_p=0.9)),
    "vllm": dict(backend="auto", vllm={"max_num_seqs": 4}),
}


INTERPRETERS = {  # what a role's python does when it is asked -> whether it is refused
    "has none": (f'exec {sys.executable} -IS "$@"', True),
    "has one": (f'PYTHONPATH=$PYTHONPATH:{{packages}} exec {sys.executable} "$@"', False),
    "does not run here": ("exit 1", False),
    "is killed": ("kill -9 $$", False),
}


@pytest.mark.parametrize("which", INTERPRETERS)
def test_plan_refuses_a_python_without_vllm_and_none_that_it_cannot_ask(calculator, tmp_path, which):
    does, refused = INTERPRETERS[which]
    (tmp_path / "packages" / "vllm").mkdir(parents=True)
    (tmp_path / "packages" / "vllm" / "__init__.py").write_text("raise SystemExit('was imported')")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{does.format(packages=tmp_path / 'packages')}\n")
    python.chmod(0o755)
    for site in (Site(1, gpus_per_node=1, python=str(python)), Site(1, gpus_per_node=1)):
        found = vllm_limits.check(config(calculator), site, None)
        assert [problem.where for problem in found] == ["backend"] * (refused and bool(site.python))
        assert all(f"vllm: {python} has no package vllm: name an environment" in problem.message for problem in found)
    assert not vllm_limits.check(config(calculator), Site(1, gpus_per_node=1, python=str(tmp_path / "absent")), None)


@pytest.mark.parametrize("where", REFUSED)
def test_settings_that_an_engine_does_not_use_are_refused_by_name(calculator, tmp_path, where):
    with pytest.raises(UserMistake) as refused:
        run(config(calculator, **REFUSED[where]), tmp_path)
    assert [problem.where for problem in refused.value.problems] == [where]
    if where == "vllm.max_num_seq":
        assert "did you mean max_num_seqs?" in str(refused.value)


WRONG = {  # what vllm.LLM raises -> what is said
    TypeError("'<' not supported between 'int' and 'str'"): "does not start with {'max_num_seqs': 2} and this model",
    ValueError("1 validation error for ModelConfig\n  Value error, no"): "(ValueError: 1 validation error for Mod",
    ValueError("Available KV cache memory is not enough"): "give the engine less to hold",
    ValueError("Available memory on node 0 on kv cache allocation is less than requested"): "VLLM_CPU_KVCACHE_SPACE in",
    RuntimeError("CUDA out of memory. Tried"): "give the engine less to hold",
}


@pytest.mark.parametrize("error", WRONG, ids=str)
def test_an_engine_that_does_not_start_is_one_sentence(error, calculator, tmp_path, monkeypatch):
    def start(self, *_, **__):
        raise error

    monkeypatch.setattr(LLM, "__init__", start)
    monkeypatch.setattr(vllm_arguments, "unknown", lambda *_: [])  # whose signature is not the stand-in's any more
    with pytest.raises(UserMistake) as refused:
        run(config(calculator, vllm={"max_num_seqs": 2}), tmp_path)
    assert WRONG[error] in str(refused.value) and "\n" not in str(refused.value)


def test_memory_that_ends_in_mid_generation_is_one_sentence(calculator, tmp_path, stand_in, monkeypatch):
    start = LLM.__init__

    def failing(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.llm_engine.dies_after = 2
        self.llm_engine.dies_of = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(LLM, "__init__", failing)
    with pytest.raises(UserMistake, match="vllm: CUDA out of memory.*give the engine less to hold"):
        run(config(calculator), tmp_path)


SITES = {
    "resources.nodes": (Site(2, nodes=2, gpus_per_node=1), {}),
    "backend": (Site(8, gpus_per_node=8), {"parallel": ParallelPlan(tensor=8)}),
    "parallel": (Site(1, gpus_per_node=8), {"parallel": ParallelPlan(tensor=2)}),
    "parallel.pipeline": (Site(1, gpus_per_node=0), {"parallel": ParallelPlan(pipeline=2)}),
}


@pytest.mark.parametrize("where", SITES)
def test_a_plan_refuses_places_that_an_engine_cannot_have(calculator, where):
    site, changes = SITES[where]
    found = generate.check(config(calculator, **changes), site.ranks, site)
    assert where in [problem.where for problem in found]


def test_a_plan_refuses_heads_that_the_cpu_build_does_not_have(calculator):
    site = Site(1, gpus_per_node=0)  # the fixture's heads are of 8
    assert "no attention for heads of 8" in str(generate.check(config(calculator), 1, site)[0])
    assert generate.check(config(calculator), 1, replace(site, gpus_per_node=1)) == []


def test_a_plan_refuses_a_family_that_vllm_does_not_have(calculator):
    site = Site(1, gpus_per_node=1, forecasts={"made": {"hf_config": {"model_type": "nanochat"}}})
    found = generate.check(replace(config(calculator), model="made"), 1, site)
    assert "vLLM 0.32 has no nanochat models" in str(found[-1])


@pytest.mark.parametrize("model_type", vllm_limits.UNTIED)
def test_a_plan_refuses_tied_embeddings_where_vllm_fills_no_output_layer_with_them(model_type, calculator):
    def found(tied):
        told = {"hf_config": {"model_type": model_type, "tie_word_embeddings": tied}}
        site = Site(1, gpus_per_node=1, forecasts={"made": told})
        return str(generate.check(replace(config(calculator), model="made"), 1, site))

    said = f"leaves the output layer of a {model_type} with tie_word_embeddings empty: use backend auto"
    assert said in found(True) and said not in found(False)


def test_a_foreign_engine_is_in_the_key_and_ours_is_not(calculator):
    keyed = {name: keyed_settings(generate.Config, config(calculator, backend=name)) for name in ("auto", "te", "vllm")}
    assert keyed["auto"] == keyed["te"] and keyed["vllm"] == {**keyed["auto"], "backend": "vllm"}
    told = config(calculator, vllm={"max_num_seqs": 4, "quantization": "fp8"})
    assert keyed_settings(generate.Config, told) == {**keyed["vllm"], "vllm": {"quantization": "fp8"}}


def test_without_megatron_core_a_foreign_engine_can_be_opened():
    names = ("foreign.vllm_backend", "foreign.exports", "rl.generation", "model_folders.merge", "weights.convert",
             "entrypoints.generate", "entrypoints.evaluate")  # fmt: skip
    imports = "".join(f"import megatron_ext.{name}; " for name in names)
    code = f"import sys; sys.modules['megatron'] = None; {imports}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("temperature, why", [(0.005, "draws at 0.01 in its place"), (2.5, "refuses it")])
def test_a_plan_refuses_a_temperature_that_vllm_would_not_draw_at(temperature, why, calculator):
    site = Site(1, gpus_per_node=1)
    found = generate.check(config(calculator, sampling=Sampling(temperature, max_tokens=6)), 1, site)
    assert [problem.where for problem in found] == ["sampling.temperature"] and why in found[0].message

    def of_evaluate(**changes):
        asked = evaluate.Config(str(calculator["base"]), "calculator", backend="vllm", max_new_tokens=6, **changes)
        asked.source = Source(synthetic_rows=40, synthetic_split="heldout")
        return [problem.where for problem in evaluate.check(asked, 1, site)]

    assert of_evaluate(samples=2, temperature=temperature) == ["temperature"]
    assert not of_evaluate(samples=0, temperature=temperature)  # which is not drawn at
    for legal in (0, 0.01, 2):
        assert not generate.check(config(calculator, samples=1, sampling=Sampling(legal, max_tokens=6)), 1, site)


def test_a_prompt_with_a_token_that_the_model_lacks_is_one_sentence_and_a_stop_token_is_left_out(
    calculator, tmp_path, stand_in, monkeypatch
):
    most = max(token for key in keys_of_all(calculator, tmp_path / "first") for token in key[0])
    monkeypatch.setattr(LLM, "vocabulary", most)
    with pytest.raises(UserMistake, match=rf"model: prompt .* has token {most}, and the model knows those below"):
        run(config(calculator), tmp_path / "second")
    monkeypatch.setattr(LLM, "vocabulary", most + 1)
    monkeypatch.setattr(generation, "stop_ids_of", lambda *_: {1, most + 1})
    run(config(calculator), tmp_path / "third")


def keys_of_all(calculator, root):
    """Return prompt and seed of each request of a run."""
    run(config(calculator), root)
    return keys(LLM.started[-1].llm_engine.asked)
