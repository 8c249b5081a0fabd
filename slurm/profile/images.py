"""Which image a role runs in, and which paths of the machine it sees."""

from pathlib import Path

from slurm.profile.schema import Profile

COMMA_PARTS_MOUNTS = ("pyxis", "apptainer")
FILES = (".sqsh", ".sif", ".simg", ".img")  # how the names of images end that are files


def image_of(profile: Profile, role: str) -> str:
    """Return the image of a role, "" for none."""
    container = profile.container
    image = container.images.get(role, container.images.get("default", ""))
    return image if container.runtime != "none" and image != "none" else ""


def is_relative(image: str) -> bool:
    """Return whether an image is a file or folder of no known place, and no name that a registry or a storage has."""
    if image.startswith("/") or "://" in image:
        return False
    return image.startswith((".", "~")) or image.endswith(FILES)


def split(mount: str) -> tuple[str, str, str]:
    """Return (source, target, "ro" or "") of SRC[:DST[:ro]]; the target is the source where none is said."""
    source, _, rest = mount.partition(":")
    target, _, flag = rest.partition(":")
    return source, target or source, flag


def unseen(profile: Profile, role: str, run: Path, paths: list[str]) -> list[str]:
    """Return those of these absolute paths that a role's container does not see under their own name."""
    if not image_of(profile, role):
        return []
    seen = [run, *(Path(source) for source, target, _ in map(split, profile.container.mounts) if source == target)]
    return [path for path in paths if not any(Path(path).is_relative_to(folder) for folder in seen)]
