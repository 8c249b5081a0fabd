"""MXFP4 experts: transformers' values bit for bit, by the orientation of their source, out again unquantised, or
quantised with an error that the format explains."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.base import durable
from megatron_ext.entrypoints import export_hf, import_hf
from megatron_ext.layers.mxfp4 import E2M1, dequantised, quantised
from megatron_ext.model_folders import model_folder
from megatron_ext.models.gpt_oss.config import hf_config
from megatron_ext.parallel.plan import ParallelPlan
from tests.megatron_ext import tiny
from tests.megatron_ext.rounding import logits_bound
from tests.megatron_ext.test_attention import forward
from tests.megatron_ext.test_families import converted, transformers_model

# As in the released models, hidden and expert sizes are equal: down_proj is square.
DIMS = replace(tiny.GPT_OSS_DIMS, hidden=64, ffn=64, dtype="bfloat16", mxfp4=True)
PACK = tiny.pack([40], seed=2)
SCALES = {"ordinary": (118, 124), "all": (0, 256)}


def random_blocks(shape: tuple[int, ...], scales: str = "ordinary", seed: int = 0):
    """Blocks and scales of a matrix [..., out, in]."""
    generator = torch.Generator().manual_seed(seed)
    *rows, columns = shape
    blocks = torch.randint(0, 256, (*rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(*SCALES[scales], (*rows, columns // 32), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_are_those_of_transformers_bit_for_bit(dtype, scales):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_blocks((3, 64, 96), scales)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # [3, in, out]
    ours = dequantised(blocks, scales, dtype)  # [3, out, in]
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(ours.mT.contiguous().view(bits), theirs.view(bits))


def test_the_low_nibble_comes_first_and_minus_zero_stays():
    blocks = torch.tensor([[0x21, 0x8F] + [0] * 14], dtype=torch.uint8)
    values = dequantised(blocks, torch.tensor([128], dtype=torch.uint8))
    assert values[:4].tolist() == [1.0, 2.0, -12.0, 0.0] and torch.signbit(values[3])


VALUES = {  # fp32 matrices of whole blocks
    "normal": lambda g: torch.randn(64, 96, generator=g),
    "of every size": lambda g: torch.randn(64, 96, generator=g) * 2.0 ** torch.randint(-100, 100, (64, 1), generator=g),
    "one of each block is far larger": lambda g: (
        torch.randn(64, 96, generator=g) * (1 + 99 * (torch.arange(96) % 32 == 0))
    ),
    "on the edges between two values": lambda g: torch.randint(-32, 33, (64, 96), generator=g) / 4.0,
    "zeros and largest": lambda g: torch.tensor([0.0, -0.0, 3.3e38, -3.3e38]).repeat(64, 24),
    "smallest": lambda g: torch.randn(64, 96, generator=g) * 2.0**-126,
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_quantised_is_as_near_as_the_format_has_values(name):
    """max(|x| / 4, m / 8) for each value x of a block whose largest is m: under a scale s with 4 s <= m < 8 s values up
    to 6 s round within a quarter of themselves, or of s; those above lose less than a quarter; under 2 s all is within
    half a unit of 2 s. Nearest: no neighbour of an E2M1 value under the same scale is nearer."""
    x = VALUES[name](torch.Generator().manual_seed(0))
    blocks, scales = quantised(x)
    back = dequantised(blocks, scales, torch.float32)
    by_block, errors = (t.unflatten(-1, (-1, 32)) for t in (x.double(), back.double() - x.double()))
    largest = by_block.abs().amax(-1, keepdim=True)
    lowest = (scales == 0)[..., None] * 2.0**-129  # half of the smallest value under the lowest scale
    bounds = torch.broadcast_tensors(by_block.abs() / 4, largest / 8, lowest)
    assert (errors.abs() <= torch.stack(bounds).amax(0)).all()
    values = torch.tensor(E2M1).double()
    scaled = torch.ldexp(by_block, 127 - scales.int()[..., None])
    nearest = (scaled[..., None] - values).abs().amin(-1)
    assert torch.equal(torch.ldexp(nearest, scales.int()[..., None] - 127), errors.abs())
    assert torch.equal(torch.signbit(back), torch.signbit(x))


@pytest.mark.parametrize("scales", SCALES)
def test_quantising_what_was_quantised_loses_no_bit_and_says_the_same_again(scales):
    values = dequantised(*random_blocks((8, 64, 96), scales), torch.float32)
    values = torch.where(torch.isfinite(values.bfloat16()), values, 1.0)
    again = quantised(values)
    if scales == "ordinary":
        assert torch.equal(dequantised(*again).float().view(torch.int32), values.view(torch.int32))
    once = dequantised(*again)
    assert all(map(torch.equal, quantised(once), again))


def test_halves_go_to_even_and_a_block_takes_the_scale_that_errs_less():
    row = (
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] + [-0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0] + [0.0] * 16
    )
    (_, scale), values = quantised(torch.tensor(row)), dequantised(*quantised(torch.tensor(row))).tolist()
    assert values[:8] == [0, 1, 1, 2, 2, 4, 4, 6] and values[8:16] == [0, -1, -1, -2, -2, -4, -4, -6] and scale == 127
    alone, among_others = (quantised(torch.tensor([7.5] + [rest] * 31)) for rest in (0.0, 1.5))
    assert alone[1] == 128 and dequantised(*alone)[0] == 8  # under 1 it would be 6
    assert among_others[1] == 127 and dequantised(*among_others)[:2].tolist() == [6, 1.5]  # under 2 each is 0.5 off


def test_numbers_that_are_none_and_rows_of_no_whole_blocks_are_refused():
    for values, said in ((torch.full((2, 32), torch.nan), "finite"), (torch.full((2, 32), torch.inf), "finite"),
                         (torch.zeros(2, 48), "48 values")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            quantised(values)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder as it is released: experts as blocks and scales, the rest bfloat16, no dtype in config.json."""
    folder = tiny.hf_folder(tmp_path_factory.mktemp("mxfp4") / "hf", replace(DIMS, mxfp4=False))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    for seed, name in enumerate(sorted(tensors)):
        if name.endswith("proj") and "experts" in name:
            count, columns, rows = tensors.pop(name).shape
            blocks, scales = random_blocks((count, rows, columns), seed=seed)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in hf_config(DIMS).items() if key not in ("dtype", "torch_dtype")}
    durable.write_json(folder / "config.json", config)
    return folder


def test_a_quantised_model_has_the_logits_of_transformers(alone, released):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    theirs = AutoModelForCausalLM.from_pretrained(
        released, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    )
    ours = tiny.model(released, DIMS, ParallelPlan())
    logits, batch = forward(ours, PACK)
    with torch.no_grad():
        expected = theirs.float().eval()(batch.ids).logits[0]
    assert (logits - expected).abs().max() <= logits_bound(theirs, batch.ids)


def test_a_quantised_model_comes_out_in_bfloat16_and_says_so(released, tmp_path):
    imported, _ = converted(released, tmp_path)
    matrices = 2 * DIMS.experts * DIMS.layers
    assert imported["dtype_changes"] == {"uint8 to bfloat16": 2 * matrices}  # blocks and scales
    before, after = load_file(released / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        if f"{name}_blocks" in before:
            expected = dequantised(before[f"{name}_blocks"], before[f"{name}_scales"]).mT.contiguous()
        else:
            expected = before[name]
        assert torch.equal(tensor.view(torch.int16), expected.view(torch.int16)), name
    transformers_model(tmp_path / "out")


# ---------------------------------------------------------------- exported as MXFP4


def exported(folder, out, **settings):
    """Facts, config.json and tensors of an export of `folder` as MXFP4, which transformers then loads."""
    out.mkdir()
    facts = export_hf.run(export_hf.Config(str(folder), quantization="mxfp4", **settings), out, out)
    return facts, json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")


def test_experts_come_out_as_the_blocks_that_they_were(released, tmp_path):
    converted(released, tmp_path)
    facts, config, after = exported(tmp_path / "model", tmp_path / "mxfp4")
    before = load_file(released / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    for name, tensor in after.items():
        if name.endswith("_scales"):
            continue  # a block without 4 or 6 has a smaller scale, and all of it doubled
        if name.endswith("_blocks"):
            scales = name.replace("_blocks", "_scales")
            ours, theirs = dequantised(tensor, after[scales]), dequantised(before[name], before[scales])
        else:
            ours, theirs = tensor, before[name]
        assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16)), name
    matrices = 2 * DIMS.experts * DIMS.layers
    told = facts["quantized"]
    assert (told["matrices"], told["exact"], told["relative_error"], told["largest_error"]) == (
        matrices,
        matrices,
        0,
        0,
    )
    assert (config["dtype"], config["quantization_config"]["quant_method"]) == ("bfloat16", "mxfp4")
    assert facts["dtype"] == "bfloat16" and facts["dtype_changes"] == {"bfloat16 to uint8": 2 * matrices}

    (tmp_path / "again").mkdir()
    import_hf.run(import_hf.Config(str(tmp_path / "mxfp4")), tmp_path / "again", tmp_path)
    once, again = (model_folder.open_folder(tmp_path / name) for name in ("model", "again"))
    assert once.weights_digest == again.weights_digest
    assert exported(tmp_path / "again", tmp_path / "mxfp4_again")[2].keys() == after.keys()
    assert (tmp_path / "mxfp4_again/model.safetensors").read_bytes() == (
        tmp_path / "mxfp4/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("dtype", ["", "float32"])
def test_transformers_loads_what_was_rounded_and_gives_our_logits(alone, dtype, tmp_path):
    """The oracle's logits are ours of the folder that its own import makes: both compute with the rounded experts."""
    from transformers import AutoModelForCausalLM

    dims = replace(DIMS, mxfp4=False)
    (tmp_path / "model").mkdir()
    import_hf.run(import_hf.Config(str(tiny.hf_folder(tmp_path / "hf", dims))), tmp_path / "model", tmp_path)
    facts, config, tensors = exported(tmp_path / "model", tmp_path / "out", dtype=dtype)
    plain = {tensor.dtype for name, tensor in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    assert plain == {getattr(torch, config["dtype"])} == {torch.float32}
    assert 0.01 < facts["quantized"]["relative_error"] < 0.25 and facts["quantized"]["exact"] == 0
    assert facts["quantized"]["by_name"].keys() == {"gate_up_proj", "down_proj"}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").float().eval()
    (tmp_path / "read").mkdir()
    import_hf.run(import_hf.Config(str(tmp_path / "out"), dtype="float32"), tmp_path / "read", tmp_path)
    logits, batch = forward(model_folder.load_model(model_folder.open_folder(tmp_path / "read"), ParallelPlan()), PACK)
    with torch.no_grad():
        assert (logits - theirs(batch.ids).logits[0]).abs().max() <= logits_bound(theirs, batch.ids)


def test_an_export_in_shares_rounds_as_one_does(released, tmp_path):
    converted(released, tmp_path)
    config = export_hf.Config(str(tmp_path / "model"), quantization="mxfp4")
    facts, _, _ = exported(tmp_path / "model", tmp_path / "whole")
    parts = [tmp_path / f"part{i}" for i in range(2)]
    for i, part in enumerate(parts):
        part.mkdir()
        export_hf.share(config, part, index=i, count=2)
    (tmp_path / "joined").mkdir()
    assert export_hf.finish(config, parts, tmp_path / "joined") == facts


def test_what_has_no_blocks_is_refused_before_anything_is_written(tmp_path):
    for name, dims, settings, said in (
        ("no blocks", tiny.GPT_OSS_DIMS, {}, "whole blocks of 32: hidden_size is 32, intermediate_size 24"),
        ("qwen2", tiny.DIMS, {}, "qwen2 models have no MXFP4"),
        ("alone", tiny.GPT_OSS_DIMS, {"adapter": "peft"}, "an adapter alone has no experts"),
    ):
        (tmp_path / name).mkdir()
        import_hf.run(import_hf.Config(str(tiny.hf_folder(tmp_path / f"{name} hf", dims))), tmp_path / name, tmp_path)
        problems = export_hf.check(export_hf.Config(str(tmp_path / name), quantization="mxfp4", **settings), 1)
        assert [problem.where for problem in problems if said in str(problem)] == ["quantization"], problems
