"""LoRA: what PEFT loads is what we train, merged is unmerged, and whoever reads a model folder gets its adapter."""

from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from data_tools.base import declared, durable
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import evaluate, export_hf, import_hf, merge_lora, sft
from megatron_ext.lora import adapters, pairs, settings
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.rollout.settings import Sampling
from megatron_ext.weights import checkpoint
from megatron_ext.weights.dist_weights import Reader
from tests.megatron_ext import adapted, shapes, tiny
from tests.megatron_ext.rollout.test_engine import SMALL, full_logprobs, requests, sampled
from tests.megatron_ext.rounding import logits_bound
from tests.megatron_ext.test_attention import forward
from tests.megatron_ext.test_families import transformers_model
from tests.megatron_ext.training import sft_config

PACK = tiny.pack([40], seed=2)


FAMILIES = {
    "qwen2": tiny.DIMS, "gpt_oss": tiny.GPT_OSS_DIMS, "nemotron_h": tiny.NEMOTRON_H_DIMS,
    "nanochat": tiny.NANOCHAT_DIMS, **tiny.KINDS,
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def dims(request):
    return FAMILIES[request.param]


def made(run, config, out):
    """The folder `out`, filled by an entrypoint, and its facts."""
    out.mkdir()
    return run(config, out, out)


@torch.no_grad()
def test_peft_and_the_merged_model_give_our_logits(alone, dims, tmp_path):
    from peft import PeftModel

    hf = tiny.hf_folder(tmp_path / "hf", dims)
    made(import_hf.run, import_hf.Config(str(hf)), tmp_path / "base")
    base = model_folder.open_folder(tmp_path / "base")
    (ours,) = adapted.attach(model_folder.load_stages(base, ParallelPlan()), dims, adapted.lora(dims))
    (tmp_path / "adapted").mkdir()
    digest = model_folder.write(tmp_path / "adapted", ours, base, step=3)
    folder = model_folder.open_folder(tmp_path / "adapted")
    assert (folder.weights_digest, folder.base_digest, folder.step) == (digest, base.weights_digest, 3)
    logits, batch = forward(ours, PACK)
    assert torch.equal(forward(model_folder.load_model(folder, ParallelPlan()), PACK)[0], logits)

    theirs = transformers_model(hf)
    plain = theirs(batch.ids).logits[0]
    assert (plain - logits).abs().max() > 0.1  # or nothing is shown
    with adapters.without(ours):
        assert (forward(ours, PACK)[0] - plain).abs().max() <= logits_bound(theirs, batch.ids)
    made(export_hf.run, export_hf.Config(str(folder.path), adapter="peft"), tmp_path / "peft")
    peft = PeftModel.from_pretrained(theirs, tmp_path / "peft")
    tolerance = logits_bound(peft, batch.ids)
    assert (peft(batch.ids).logits[0] - logits).abs().max() <= tolerance

    peft.save_pretrained(tmp_path / "theirs")  # PEFT writes, we read
    made(import_hf.run, import_hf.Config(str(hf), adapter=str(tmp_path / "theirs")), tmp_path / "read")
    read = model_folder.open_folder(tmp_path / "read")
    assert settings.chosen(read.lora, read.shape) == settings.chosen(folder.lora, read.shape)
    assert torch.equal(forward(model_folder.load_model(read, ParallelPlan()), PACK)[0], logits)

    facts = made(merge_lora.run, merge_lora.Config(str(folder.path)), tmp_path / "merged")
    merged = model_folder.open_folder(tmp_path / "merged")
    (loaded,) = model_folder.load_stages(merged, ParallelPlan())
    assert merged.lora is None and facts["weights_digest"] == checkpoint.weights_digest(loaded)
    assert (forward(loaded, PACK)[0] - logits).abs().max() <= tolerance
    made(export_hf.run, export_hf.Config(str(folder.path)), tmp_path / "whole")
    assert (transformers_model(tmp_path / "whole")(batch.ids).logits[0] - logits).abs().max() <= tolerance


def test_merging_by_shares_is_merging_at_once(alone, tmp_path):
    dims = tiny.GPT_OSS_DIMS
    made(import_hf.run, import_hf.Config(str(tiny.hf_folder(tmp_path / "hf", dims))), tmp_path / "base")
    base = model_folder.open_folder(tmp_path / "base")
    model = adapted.attach(model_folder.load_stages(base, ParallelPlan()), dims, adapted.lora(dims))
    (tmp_path / "adapted").mkdir()
    model_folder.write(tmp_path / "adapted", model, base, step=0)
    config = merge_lora.Config(str(tmp_path / "adapted"))
    whole = made(merge_lora.run, config, tmp_path / "whole")
    parts = [tmp_path / f"part{i}" for i in range(2)]
    for i, part in enumerate(parts):
        part.mkdir()
        merge_lora.share(config, part, index=i, count=2)
    (tmp_path / "joined").mkdir()
    assert merge_lora.finish(config, parts, tmp_path / "joined") == whole
    assert model_folder.open_folder(tmp_path / "joined").weights_digest == whole["weights_digest"]


def test_the_rollout_engine_samples_from_the_adapted_model(alone, dims, tmp_path):
    hf = tiny.hf_folder(tmp_path / "hf", dims)
    (model,) = adapted.attach(tiny.parts(hf, dims, ParallelPlan()), dims, adapted.lora(dims))
    greedy = Sampling(temperature=0, max_tokens=8)
    found = sampled(model, SMALL, requests(1), greedy)
    for sequence in found.values():
        logprobs, best = full_logprobs(model, sequence)
        assert best.tolist() == sequence.completion
        assert (logprobs - torch.tensor(sequence.model_logprobs)).abs().max() <= 1e-4
    with adapters.without(model):
        plain = sampled(model, SMALL, requests(1), greedy)
    assert any(plain[uid].completion != found[uid].completion for uid in found)


# ---------------------------------------------------------------- training


def lora_config(calculator, steps: int, **changes) -> sft.Config:
    lora = LoraConfig(4, 8.0, 0.1, ["all-linear"])
    return replace(sft_config(calculator, steps), lora=lora, keep_checkpoints=9, lr=1e-2, **changes)


def test_a_run_killed_in_between_ends_with_the_same_bits(two_ranks, calculator, tmp_path):
    """Dropout and all; and the base stays what it was."""
    plan = ParallelPlan(tensor=2, sequence_parallel=True)
    config = lora_config(calculator, 6, parallel=plan, save_in_background=False, checkpoint_every=3)

    def trained(name: str) -> dict:
        (tmp_path / name).mkdir()
        return two_ranks.run(sft.run, config=config, out=tmp_path / name, keep=tmp_path / "keep")[0]

    whole = trained("whole")
    checkpoint._remove(tmp_path / "keep" / "checkpoints" / "step_6")
    resumed = trained("resumed")
    assert (whole["resumed_from"], resumed["resumed_from"]) == (0, 3)
    assert whole["loss_last"] < whole["loss_first"]
    assert resumed["weights_digest"] == whole["weights_digest"]
    folders = [model_folder.open_folder(tmp_path / name) for name in ("whole", "resumed")]
    assert folders[0].base_digest == model_folder.open_folder(calculator["base"]).weights_digest
    files = [folder.adapter / "adapter_model.safetensors" for folder in folders]
    assert files[0].read_bytes() == files[1].read_bytes()
    stored = Reader(tmp_path / "keep" / "checkpoints" / "step_6" / "state").tensors()
    assert all(".lora_" in key for key in stored) and any(key.startswith("optimizer.") for key in stored)


@pytest.fixture(scope="module")
def trained(calculator, tmp_path_factory):
    """Folder and facts of a short training with LoRA."""
    root = tmp_path_factory.mktemp("lora")
    (root / "out").mkdir()
    return root / "out", sft.run(lora_config(calculator, 5), root / "out", root / "keep")


def test_evaluation_reads_the_adapter(calculator, trained, tmp_path):
    """As of the merged model; a base that merely has the same folder would answer otherwise."""
    from data_tools.tasks.task import Source

    made(merge_lora.run, merge_lora.Config(str(trained[0])), tmp_path / "merged")
    found = {}
    for name, folder in (("adapted", trained[0]), ("merged", tmp_path / "merged"), ("base", calculator["base"])):
        source = Source(synthetic_rows=20, synthetic_split="heldout")
        config = evaluate.Config(model=str(folder), source=source, max_new_tokens=4)
        made(evaluate.run, config, tmp_path / f"eval {name}")
        found[name] = (tmp_path / f"eval {name}" / "samples.jsonl").read_text()
    assert found["adapted"] == found["merged"] != found["base"]


def test_training_goes_on_with_the_adapter_or_refuses(calculator, trained, tmp_path):
    config = replace(lora_config(calculator, 5), model=str(trained[0]))
    facts = made(sft.run, config, tmp_path / "more")
    assert facts["loss_first"] == pytest.approx(trained[1]["loss_last"], rel=0.3)
    assert facts["loss_first"] < trained[1]["loss_first"]
    assert model_folder.open_folder(tmp_path / "more").base_digest == model_folder.open_folder(trained[0]).base_digest
    for lora in (LoraConfig(), LoraConfig(8, 8.0)):
        (problem,) = sft.check(replace(config, lora=lora), 1)
        assert (
            problem.where == "lora" and "has an adapter of rank 4, alpha 8, targets ['all-linear']" in problem.message
        )
        assert "merge it first (merge_lora)" in problem.message
    with pytest.raises(UserMistake, match="merge it first"):
        model_folder.weights_at(trained[0])


# ---------------------------------------------------------------- what the targets reach


def test_the_matrices_reached_are_those_of_the_weights(dims):
    """The torch-free count against the rules, for each target alone and all of them."""
    shape = tiny.family(dims).config.shape(dims)
    known = settings.targets_of(shape)
    for targets in [*([name] for name in known), known]:
        config = LoraConfig(2, 2.0, targets=targets)
        found = pairs.pairs(tiny.family(dims), dims, config)
        reached = trainable = 0
        for pair in found:
            for size, adapted_ in zip(pair.matrix.layout.hf_shapes(), pair.parts):
                reached += adapted_ * torch.Size(size).numel()
            trainable += pair.a.layout.shape[0] * pair.a.layout.shape[1]
            trainable += sum(torch.Size(s).numel() for s, own in zip(pair.b.layout.hf_shapes(), pair.parts) if own)
        said = settings.reach(config, shape)
        assert (said["reached"], said["trainable"]) == (reached, trainable), targets


def test_all_linear_of_gpt_oss_says_what_it_misses():
    """It reaches attention only, as PEFT's does; the line that is shown says how little that is."""
    config = LoraConfig(4, 8.0)
    found = settings.reach(config, shapes.GPT_OSS_20B)
    assert found["targets"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert found["parameters"] == 20_914_757_184
    assert settings.reach_text(found, 4).startswith("LoRA of rank 4: 1,990,656 parameters trained beside 3.0%")
    assert "not router 0.0%, experts 91.4%" in settings.reach_text(found, 4)


# ---------------------------------------------------------------- mistakes

SHAPE = tiny.family(tiny.GPT_OSS_DIMS).config.shape(tiny.GPT_OSS_DIMS)
WRONG = {
    "rank below 0": (dict(rank=-1), "lora.rank: -1 is out of range: at least 0 (columns)"),
    "off, but meant": (dict(alpha=8.0), "lora.rank: is 0, which turns LoRA off, but other settings of it are given"),
    "alpha 0": (dict(rank=4, alpha=0.0), "lora.alpha: 0.0 is out of range: above 0"),
    "dropout 1": (dict(rank=4, dropout=1.0), "lora.dropout: 1.0 is out of range: at least 0, below 1"),
    "nothing": (dict(rank=4, targets=[]), "lora.targets: names nothing: use [all-linear]"),
    "misspelt": (
        dict(rank=4, targets=["q_prj"]),
        "lora.targets: this model has no 'q_prj' (did you mean q_proj? known: all-linear, q_proj, k_proj, v_proj, "
        "o_proj, router, experts)",
    ),
    "embedding": (
        dict(rank=4, targets=["embed_tokens"]),
        "lora.targets: embed_tokens cannot be adapted: the embedding stays as it is; leave it out",
    ),
    "dropout of experts": (
        dict(rank=4, dropout=0.1, targets=["experts", "q_proj"]),
        "lora.dropout: PEFT knows no dropout for experts: use 0, or leave it out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_named_with_the_remedy(case):
    changes, message = WRONG[case]
    problems = declared.check_with(LoraConfig(**changes), lambda config: settings.check(config, SHAPE))
    assert [f"lora.{str(problem).removeprefix('lora.')}" for problem in problems] == [message]


def test_adapters_that_are_not_understood_are_refused(alone, tmp_path):
    hf = tiny.hf_folder(tmp_path / "hf")
    peft = tmp_path / "peft"
    peft.mkdir()

    def problems(**fields) -> str:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **fields}
        durable.write_json(peft / "adapter_config.json", config)
        return "\n".join(map(str, import_hf.check(import_hf.Config(str(hf), adapter=str(peft)), 1)))

    assert "use_dora True is not understood: merge the adapter with PEFT first" in problems(use_dora=True)
    assert "rank_pattern {'q_proj': 4} is not understood" in problems(rank_pattern={"q_proj": 4})
    assert "peft_type 'IA3' is none that we have" in problems(peft_type="IA3")
    assert "no PEFT folder" in str(import_hf.check(import_hf.Config(str(hf), adapter=str(hf)), 1)[0])
    assert problems(target_modules=["q_prj"]) == ""
    save_file({}, peft / "adapter_model.safetensors")
    with pytest.raises(UserMistake, match="has no 'q_prj' .did you mean q_proj"):
        made(import_hf.run, import_hf.Config(str(hf), adapter=str(peft)), tmp_path / "a")
    assert problems() == ""
    with pytest.raises(
        UserMistake, match=r"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight \[2, 32\] is missing"
    ):
        made(import_hf.run, import_hf.Config(str(hf), adapter=str(peft)), tmp_path / "b")


def test_exports_that_peft_would_not_load_are_refused(tmp_path):
    site = Site(
        1, forecasts={"m": {"adapter": {"lora": asdict(LoraConfig(4, 8.0, targets=["out_proj"]))}}, "p": {"x": 1}}
    )
    (problem,) = export_hf.check(export_hf.Config("m", adapter="peft"), 1, site)
    assert "PEFT adapts no out_proj" in problem.message and problem.message.endswith("use merged")
    (problem,) = export_hf.check(export_hf.Config("p", adapter="peft"), 1, site)
    assert "has none for peft" in problem.message
    (problem,) = declared.check(export_hf.Config("m", adapter="pfet"))
    assert "did you mean peft?" in problem.message
    (problem,) = merge_lora.check(merge_lora.Config("p"), 1, site)
    assert "has no adapter" in problem.message
