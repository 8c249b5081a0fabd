"""TRL's own loss on given log-probs: `GRPOTrainer._compute_loss` of the pinned version, without a model."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl import GRPOTrainer

NAMES = {  # ours (policy, level, aggregation) -> TRL's (loss_type, importance_sampling_level)
    ("clip", "token", "token"): ("dapo", "token"),
    ("clip", "token", "sequence"): ("grpo", "token"),
    ("clip", "token", "constant"): ("dr_grpo", "token"),
    ("clip", "sequence", "sequence"): ("grpo", "sequence"),
    ("clip", "sequence", "token"): ("dapo", "sequence"),
    ("cispo", "token", "token"): ("cispo", "token"),
}


class _Accelerator:
    num_processes = 1
    sync_gradients = True

    def gather(self, x: Any) -> Any:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Any, reduction: str = "sum") -> Any:
        return x


def trl_loss(
    logp: torch.Tensor,
    old: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    *,
    names: tuple[str, str],
    clip: tuple[float, float],
    longest: int,
    dual_clip: float = 0.0,
    beta: float = 0.0,
    reference: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of rows [rows, width], padded where `mask` is 0; advantages [rows]."""
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.loss_type, trainer.importance_sampling_level = names
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.beta, trainer.epsilon_low = beta, clip[0]
    trainer.epsilon_high = 1 + clip[1] if names[0] == "cispo" else clip[1]
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = importance is not None
    trainer.max_completion_length, trainer.current_gradient_accumulation_steps = longest, 1
    trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
    trainer.accelerator, trainer._metrics = _Accelerator(), defaultdict(lambda: defaultdict(list))
    trainer.args = SimpleNamespace(
        use_bias_correction_kl=True, delta=dual_clip or None, steps_per_generation=1, generation_batch_size=1
    )
    trainer.model = SimpleNamespace(training=True)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros_like(logp), None)
    ids = torch.zeros_like(mask, dtype=torch.int64)
    inputs = dict(
        prompt_ids=ids[:, :1],
        prompt_mask=ids[:, :1] + 1,
        completion_ids=ids,
        completion_mask=mask,
        advantages=advantages,
        old_per_token_logps=old,
        ref_per_token_logps=reference,
        importance_sampling_ratio=importance,
        num_items_in_batch=mask.sum(),
    )
    return trainer._compute_loss(None, {key: value for key, value in inputs.items() if value is not None})
