"""Megatron-LM itself on a CPU: its parser, its builder, its loader and its writer, as its pretrain_gpt.py calls them.

    python -m tests.megatron_ext.megatron_lm FOLDER FORMAT

loads FOLDER/exported with the words of its arguments.txt, holds the logits against those of FOLDER/logits.pt and saves
FOLDER/saved as FORMAT (torch_dist or torch). The wheel of megatron-core has `megatron.training` from 0.19 on, for
Python 3.12 and later. What is ours here: `init_device`, and the start of the process groups, which Megatron-LM makes
only where there are GPUs. Its layers are the local ones, under the names that Transformer Engine's have.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from megatron_ext.device import init_device

WORDS = """
    --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-4 --seq-length 64 --transformer-impl local
    --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --no-rope-fusion --attention-backend unfused --distributed-backend gloo
    --tokenizer-type NullTokenizer --make-vocab-size-divisible-by 1 --save-interval 1
    --use-distributed-optimizer
"""


def start(*_: Any, **__: Any) -> None:
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(7)


def model_of(arguments: Any) -> torch.nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder, default_layer_spec

    config = gpt_config_from_args(arguments)
    if config.transformer.num_moe_experts:
        config.transformer_layer_spec = spec = default_layer_spec(config, None)
        often = config.transformer.moe_layer_freq
        often = often if isinstance(often, list) else [often] * len(spec.layer_specs)
        for layer in [layer for layer, has in zip(spec.layer_specs, often) if has]:
            names = layer.submodules.sharded_state_dict_keys_map
            layer.submodules.sharded_state_dict_keys_map = {k: v for k, v in names.items() if "mlp" not in k}
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups()).eval()


def after_a_step(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.nn.Module, Any]:
    """Return the model as it is trained, as it was, and its optimizer, which has states after a step of length 0."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    trained = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model.train()
    )
    settings = OptimizerConfig(optimizer="adam", lr=0.0, weight_decay=0.0, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [trained])
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    trained(tokens, positions, mask, labels=tokens).mean().backward()
    trained.finish_grad_sync()
    assert optimizer.step()[0]
    return trained, optimizer


def main(folder: Path, form: str) -> None:
    init_device()
    found = torch.load(folder / "logits.pt", weights_only=True)
    exported = folder / "exported"
    said = [*(exported / "arguments.txt").read_text().split(), "--load", str(exported), "--save", str(folder / "saved")]
    sys.argv = ["pretrain_gpt.py", *said, *WORDS.split(), "--vocab-size", str(found["rows"])]
    from megatron.training import checkpointing, get_args, initialize
    from megatron.training.arguments import parse_and_validate_args

    initialize._initialize_distributed, initialize._compile_dependencies = start, lambda: None
    parse_and_validate_args()
    initialize.initialize_megatron(allow_no_cuda=True)
    arguments = get_args()
    model = model_of(arguments)
    checkpointing.load_checkpoint([model], None, None)
    length = found["tokens"].size(1)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model(found["tokens"], torch.arange(length).expand_as(found["tokens"]), mask)
    wanted = found["logits"]
    logits = logits[..., : wanted.size(-1)]
    assert torch.allclose(logits, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    trained, optimizer = after_a_step(model, found["tokens"], mask)
    arguments.ckpt_format, arguments.use_dist_ckpt = form, form == "torch_dist"
    checkpointing.save_checkpoint(3, [trained], optimizer, None, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
