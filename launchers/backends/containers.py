"""Wraps a role's command into its container: what srun is told, what stands before the command, what is exported.

The batch script itself, its health check and the restarts run outside. Each image sees the run's folder, and what the
profile mounts. Sources: pyxis by its README (`srun --help` with the plugin), apptainer by `apptainer exec --help` and
its manual's chapter on environments, charliecloud by ch-run(1) 0.31. Of these only charliecloud has been run here.
"""

from dataclasses import dataclass, field
from pathlib import Path

from slurm.profile.environments import environment_of, site_variables
from slurm.profile.images import image_of, split, unseen
from slurm.profile.schema import Profile

OURS = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Contained:
    """How a command is put into a container; without one nothing of this is said."""

    srun: list[str] = field(default_factory=list)  # options
    before: list[str] = field(default_factory=list)  # words before the command
    exports: list[str] = field(default_factory=list)  # shell lines of the batch script
    python: str = ""  # the image's; "": there is no container


def contained(profile: Profile, role: str, run: Path, with_gpus: bool) -> Contained:
    """Return how the commands of a role are put into its container."""
    image, container = image_of(profile, role), profile.container
    if not image:
        return Contained()
    env = environment_of(profile, role)
    names = list(dict.fromkeys([*OURS, *site_variables(profile), *env.set, *env.forward]))
    mounts = [(str(run), str(run), ""), *(split(mount) for mount in container.mounts)]
    if container.runtime == "pyxis":
        listed = ",".join(":".join(filter(None, mount)) for mount in mounts)
        options = [f"--container-image={image}", f"--container-mounts={listed}", f"--container-workdir={run}",
                   f"--container-env={','.join(names)}"]  # fmt: skip
        return Contained(srun=[*options, *container.args], python=container.python)
    if container.runtime == "apptainer":
        bound = [word for mount in mounts for word in ("--bind", ":".join(filter(None, mount)))]
        gpus = ["--nv"] if with_gpus else []
        # The image's own environment would win otherwise; a variable that is not set stays so.
        exports = [f'[ -z "${{{name}+x}}" ] || export APPTAINERENV_{name}="${name}"' for name in names]
        before = ["apptainer", "exec", *gpus, *bound, "--pwd", str(run), *container.args, image]
        return Contained(before=before, exports=exports, python=container.python)
    if not unseen(profile, role, run=Path("/nowhere"), paths=[str(run)]):
        mounts = mounts[1:]  # it lies in a folder that is mounted, and a place to mount it at must be in the image
    bound = [word for source, target, _ in mounts for word in ("-b", f"{source}:{target}")]
    return Contained(
        before=["ch-run", *bound, "-c", str(run), *container.args, image, "--"],
        exports=['export USER="${USER:-$(id -un)}"'],  # it refuses to run without, and --export=NONE leaves none
        python=container.python,
    )
