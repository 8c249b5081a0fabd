"""Which trackers a training reports to besides metrics.jsonl. No torch."""

from dataclasses import dataclass

from data_tools.mistake import Problem, nearest

WANDB = ("off", "offline", "online")


@dataclass
class Track:
    wandb: str = "off"  # off | offline (no internet there; later `wandb sync KEEP/wandb/offline-run-*`) | online
    project: str = "afterok"
    entity: str = ""
    name: str = ""  # of the W&B run; "": W&B chooses
    tensorboard: bool = False  # event files in KEEP/tensorboard


def check(track: Track, where: str = "track") -> list[Problem]:
    if track.wandb not in WANDB:
        return [Problem(f"{where}.wandb", f"unknown value {track.wandb!r}{nearest(track.wandb, WANDB)}")]
    return []
