"""LoRA: what PEFT loads is what we train, merged is unmerged, nothing but adapters changes, and a run goes on as it
was."""

import pytest
import torch

from megatron_ext import checkpoint, train
from megatron_ext.lora import adapters, pairs, peft_format, settings
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel import ParallelPlan
from tests.megatron_ext import adapted, tiny
from tests.megatron_ext.test_attention import forward
from tests.megatron_ext.test_families import TOLERANCE, transformers_model


@pytest.fixture(params=adapted.FAMILIES)
def dims(request):
    return adapted.FAMILIES[request.param]


def model_of(folder, dims, lora=None):
    return adapted.attach(tiny.parts(folder, dims, ParallelPlan()), dims, lora or adapted.lora(dims))


def test_peft_loads_the_adapter_and_gives_our_logits(alone, dims, tmp_path):
    from peft import PeftModel

    hf = tiny.hf_folder(tmp_path / "hf", dims)
    (ours,) = model_of(hf, dims)
    peft_format.write_model(tmp_path / "adapter", ours, tiny.family(dims), dims)
    base = transformers_model(hf)
    logits, batch = forward(ours, tiny.pack([40], seed=2))
    with torch.no_grad():
        before = base(batch.ids).logits[0]
        after = PeftModel.from_pretrained(base, tmp_path / "adapter")(batch.ids).logits[0]
    assert (after - before).abs().max() > 0.1
    assert (after - logits).abs().max() <= TOLERANCE[tiny.family(dims).name]
    with adapters.without(ours):
        assert (forward(ours, tiny.pack([40], seed=2))[0] - before).abs().max() <= TOLERANCE[tiny.family(dims).name]
