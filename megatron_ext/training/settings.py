"""What every training is told, whether it learns from packs (sft) or from rewards (grpo). No torch."""

from dataclasses import dataclass

from data_tools.base.declared import setting
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel.settings import ModelSettings
from megatron_ext.training import schedule as schedules
from megatron_ext.training.track import Track
from megatron_ext.training.watch import Hang


@dataclass
class TrainingSettings(ModelSettings):
    """A training of a model folder: its learning rate, AdamW, adapters, checkpoints and trackers."""

    dtype: str = setting(
        "", 'type of the weights in training; "" keeps that of the model folder', choices=("", "float32", "bfloat16")
    )

    schedule: str = setting("constant", "course of the learning rate after the warm-up", choices=schedules.SHAPES)
    lr: float = setting(1e-6, "highest learning rate", above=0)
    min_lr: float = setting(0.0, "last learning rate of every schedule but constant", least=0)
    warmup_steps: int = setting(0, "updates until the learning rate is at its highest", unit="steps", least=0)
    decay_share: float = setting(0.2, "share of all steps over which wsd decays", above=0, most=1)

    weight_decay: float = setting(0.0, "AdamW's weight decay", least=0)
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient", least=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of the mean squared gradient", least=0, below=1)
    epsilon: float = setting(1e-8, "AdamW's epsilon", least=0)
    clip_grad: float = setting(1.0, "norm that gradients are clipped to; 0 turns clipping off", least=0)
    lora: LoraConfig = setting(LoraConfig, "adapters that are trained in place of the model")

    checkpoint_every: int = setting(
        0, "steps between two checkpoints; 0: only at the end", unit="steps", least=0, keyed=False
    )
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints stay", least=1, keyed=False)
    keep_every: int = setting(
        0, "checkpoints of multiples of this step stay for good; 0: none", unit="steps", least=0, keyed=False
    )
    save_in_background: bool = setting(True, "training goes on while a checkpoint is written", keyed=False)
    track: Track = setting(Track, "trackers besides metrics.jsonl", keyed=False)
    hang: Hang = setting(Hang, "when training that no longer moves is ended", keyed=False)
    distributed_timeout_minutes: int = setting(
        30, "a rank that waits longer than this for another takes it for dead", unit="minutes", least=1, keyed=False
    )
