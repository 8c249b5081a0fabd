"""Which trackers a training reports to besides metrics.jsonl. No torch."""

from dataclasses import dataclass

from data_tools.base.declared import setting

WANDB = ("off", "offline", "online")


@dataclass
class Track:
    """Trackers that a training reports to."""

    wandb: str = setting(
        "off", "Weights & Biases; offline needs no internet, later `wandb sync KEEP/wandb/offline-run-*`", choices=WANDB
    )
    project: str = setting("afterok", "project of the W&B run", example="my-project", free=True)
    entity: str = setting("", 'user or team of the W&B run; "": that of the W&B key', example="my-team", free=True)
    name: str = setting("", 'name of the W&B run; "": W&B chooses', example="first-try", free=True)
    tensorboard: bool = setting(False, "event files in KEEP/tensorboard")
