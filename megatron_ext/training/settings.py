"""What a training is told: one of any kind, and one on packs. No torch: plans and checks read it too."""

from dataclasses import dataclass

from data_tools.base.declared import MODELS, PACKS, SEEDS, STORES, setting, with_default
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel.settings import ModelSettings
from megatron_ext.training.muon import OPTIMIZERS, Muon
from megatron_ext.training.options import Engine, ExpertBalance
from megatron_ext.training.schedule import SHAPES, Amount, Schedule, updates
from megatron_ext.training.track import Track
from megatron_ext.training.watch import Hang


@dataclass
class TrainingSettings(ModelSettings):
    """A training of a model folder: its learning rate, AdamW, adapters, checkpoints and trackers."""

    dtype: str = setting(
        "", 'type of the weights in training; "" keeps that of the model folder', choices=("", "float32", "bfloat16")
    )

    schedule: str = setting("constant", "course of the learning rate after the warm-up", choices=SHAPES)
    lr: float = setting(1e-6, "highest learning rate", above=0)
    min_lr: float = setting(0.0, "last learning rate of every schedule but constant", least=0, example=1e-7)
    warmup_steps: int = setting(0, "updates until the learning rate is at its highest", unit="steps", least=0)
    decay_share: float = setting(0.2, "share of all steps over which wsd decays", above=0, most=1, example=0.1)

    optimizer: str = setting(
        "", 'what makes the updates: "" AdamW; muon: Muon of the matrices between the layers, AdamW of the rest',
        choices=OPTIMIZERS, keyed="if_set",
    )  # fmt: skip
    weight_decay: float = setting(0.0, "AdamW's weight decay, and Muon's", least=0, example=0.1)
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient", least=0, below=1, example=0.95)
    beta2: float = setting(0.95, "AdamW's decay of the mean squared gradient", least=0, below=1, example=0.999)
    epsilon: float = setting(1e-8, "AdamW's epsilon", least=0, example=1e-6)
    muon: Muon = setting(Muon, "how Muon makes its updates, with optimizer muon", keyed="if_set")
    clip_grad: float = setting(
        1.0, "norm that gradients are clipped to; 0 or less turns clipping off", free=True, example=0.5
    )
    lora: LoraConfig = setting(LoraConfig, "adapters that are trained in place of the model")

    checkpoint_every: int = setting(
        0, "steps between two checkpoints; 0: only at the end", unit="steps", least=0, keyed=False
    )
    keep_checkpoints: int = setting(
        2, "how many of the newest checkpoints stay", unit="checkpoints", least=1, keyed=False
    )
    keep_every: int = setting(
        0, "checkpoints of multiples of this step stay for good; 0: none", unit="steps", least=0, keyed=False
    )
    save_in_background: bool = setting(True, "training goes on while a checkpoint is written", keyed=False)
    track: Track = setting(Track, "trackers besides metrics.jsonl", keyed=False)
    hang: Hang = setting(Hang, "when training that no longer moves is ended", keyed=False)
    distributed_timeout_minutes: int = setting(
        30, "a rank that waits longer than this for another takes it for dead", unit="minutes", least=1, keyed=False
    )

    def checkpoints_at_once(self, updates: int) -> int:
        """Return how many checkpoints lie on the disk at once: while one is written, those that stay are there too."""
        made = -(-updates // self.checkpoint_every) if self.checkpoint_every else 1
        for_good = updates // self.keep_every if self.keep_every else 0
        return min(max(made, 1), self.keep_checkpoints + 1 + for_good)

    def schedule_of(self, steps: int, warmup: float) -> Schedule:
        """Return the learning rate over so many updates, of which `warmup` (not always whole) warm up."""
        return Schedule(
            shape=self.schedule,
            steps=steps,
            peak=self.lr,
            floor=self.min_lr,
            warmup=warmup,
            decay_share=self.decay_share,
        )


@dataclass
class SftSettings(TrainingSettings):
    """Supervised fine-tuning on packs: the config of the phase sft."""

    store: str = setting("", "token store", example="${phases.data.out}", needed=True, input=True, made_by=STORES)
    packs: str = setting(
        "", "pack plan of that store", example="${phases.packs.out}", needed=True, input=True, made_by=PACKS
    )
    blend_stores: list[str] = setting(
        list,
        "further token stores, blended by weight",
        example=["${phases.more_data.out}"],
        free=True,
        input=True,
        made_by=STORES,
    )
    blend_packs: list[str] = setting(
        list,
        "pack plans of the further stores",
        example=["${phases.more_packs.out}"],
        free=True,
        input=True,
        made_by=PACKS,
    )
    blend_weights: list[float] = setting(
        list, "shares of packs: that of `packs`, then that of each further plan", above=0
    )
    valid_stores: list[str] = setting(
        list,
        "token stores of the validation sets",
        example=["${phases.valid_data.out}"],
        free=True,
        input=True,
        made_by=STORES,
    )
    valid_packs: list[str] = setting(
        list,
        "pack plans of the validation sets",
        example=["${phases.valid_packs.out}"],
        free=True,
        input=True,
        made_by=PACKS,
    )
    init_from: str = setting(
        "",
        "weights to begin with: a model folder, a step, or the folder of a training",
        example="${phases.cold_start.out}",
        free=True,
        input=True,
        made_by=MODELS,
    )
    init_step: int = setting(
        0, "step of the training in init_from; 0: what it sealed, else its newest", unit="steps", least=0
    )

    steps: int = setting(
        0, "updates; the first limit that is reached ends the training; 0: no limit", unit="steps", least=0
    )
    samples: int = setting(0, "packs; what is less than an update is left out; 0: no limit", unit="packs", least=0)
    tokens: int = setting(0, "tokens, padding counts; 0: no limit", unit="tokens", least=0, example=1_000_000_000)
    minutes: float = setting(
        0.0, "time of training, all attempts together; it then ends early, and the schedule with it; 0: no limit",
        unit="minutes", least=0,
    )  # fmt: skip
    global_batch: int = setting(2, "packs of an update", unit="packs", least=1)
    seed: int = setting(0, "order of the packs, dropout", **SEEDS)

    schedule: str = with_default(TrainingSettings, "schedule", "wsd")
    lr: float = with_default(TrainingSettings, "lr", 1e-3)
    warmup_samples: int = setting(0, "the warm-up in packs, in place of warmup_steps", unit="packs", least=0)
    warmup_tokens: int = setting(0, "the warm-up in tokens, in place of warmup_steps", unit="tokens", least=0)
    balance: ExpertBalance = setting(ExpertBalance, "how the work of experts is balanced")

    engine: Engine = setting(Engine, "how the training uses its GPUs", keyed=False)
    log_every: int = setting(10, "steps between two lines of metrics", unit="steps", least=1, keyed=False)
    validate_every: int = setting(
        0, "steps between two validations; 0: only at the end", unit="steps", least=0, keyed=False
    )
    certify: bool = setting(False, "first show that the parallel layout computes what one process does", keyed=False)

    def rate_schedule(self, pack_length: int | None) -> Schedule:
        """Return how many updates there are and their learning rates.

        What is given in tokens counts for nothing while the length of packs is not known.
        """
        warmup = Amount(self.warmup_steps, self.warmup_samples, self.warmup_tokens)
        length = Amount(self.steps, self.samples, self.tokens)
        given = warmup.in_steps(self.global_batch, pack_length)
        return self.schedule_of(updates(length, self.global_batch, pack_length), given[0] if given else 0)
