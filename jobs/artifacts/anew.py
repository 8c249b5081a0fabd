"""A sealed phase that runs anew: all that it made under its key is set aside whole, checkpoints and metrics too."""

import itertools
from pathlib import Path

from data_tools.base import durable
from jobs.artifacts.layout import ArtifactLayout


def retire(artifact: Path) -> Path | None:
    """Set a phase's KEY folder aside and return where it lies now; None where there was none."""
    if not artifact.exists():
        return None
    aside = ArtifactLayout(artifact).retired_folder
    aside.mkdir(parents=True, exist_ok=True)
    place = next(path for n in itertools.count(1) if not (path := aside / f"{artifact.name}.{n}").exists())
    artifact.rename(place)
    durable.fsync_folder(artifact.parent)
    return place


def restore(place: Path, artifact: Path) -> None:
    """Put back what `retire` set aside, where nothing has taken its place."""
    if not artifact.exists():
        place.rename(artifact)
        durable.fsync_folder(artifact.parent)


def how_to_run_anew(artifact: Path) -> str:
    """Say how the phase of RUN/PHASE/KEY is run anew."""
    return (
        f"run it anew: `afterok resubmit {artifact.parent.parent} {artifact.parent.name} --again` (what it made is "
        "set aside)"
    )
