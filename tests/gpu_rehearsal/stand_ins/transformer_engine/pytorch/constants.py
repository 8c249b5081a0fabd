"""Numbers that Transformer Engine gives torch's types."""

import torch

TE_DType = {torch.uint8: 0, torch.int32: 2, torch.float32: 4, torch.float16: 5, torch.bfloat16: 6}
GemmParallelModes = ("row", "column", None)
AttnTypes = ("self", "cross")
AttnMaskTypes = (
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
    "arbitrary",
)
dist_group_type = torch.distributed.ProcessGroup
