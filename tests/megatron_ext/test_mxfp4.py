"""MXFP4 experts: transformers' values bit for bit, by the orientation of their source, out again unquantised."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.base import durable
from megatron_ext.models.gpt_oss.config import hf_config
from megatron_ext.models.gpt_oss.mxfp4 import dequantised
from megatron_ext.parallel.plan import ParallelPlan
from tests.megatron_ext import tiny
from tests.megatron_ext.rounding import logits_bound
from tests.megatron_ext.test_attention import forward
from tests.megatron_ext.test_families import converted, transformers_model

# As in the released models, hidden and expert sizes are equal: down_proj is square.
DIMS = replace(tiny.GPT_OSS_DIMS, hidden=64, ffn=64, dtype="bfloat16", mxfp4=True)
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


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
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


def test_a_quantised_model_has_the_logits_of_transformers(alone, quantised):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    theirs = AutoModelForCausalLM.from_pretrained(
        quantised, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    )
    ours = tiny.model(quantised, DIMS, ParallelPlan())
    logits, batch = forward(ours, tiny.pack([40], seed=2))
    with torch.no_grad():
        expected = theirs.float().eval()(batch.ids).logits[0]
    assert (logits - expected).abs().max() <= logits_bound(theirs, batch.ids)


def test_a_quantised_model_comes_out_in_bfloat16_and_says_so(quantised, tmp_path):
    imported, _ = converted(quantised, tmp_path)
    matrices = 2 * DIMS.experts * DIMS.layers
    assert imported["dtype_changes"] == {"uint8 to bfloat16": 2 * matrices}  # blocks and scales
    before, after = load_file(quantised / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
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
