"""What a job finds: the environment of its role, the names of the network, and folders."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_tools.base.inside import expanded
from slurm.profile.images import image_of
from slurm.profile.schema import Env, Profile, RoleEnv


def environment_of(profile: Profile, role: str) -> Env:
    """Return the environment of a role: the profile's, with what the role has otherwise. An unknown role has none."""
    if role not in profile.roles:
        return profile.env
    own, env = profile.roles[role].env, profile.env
    said = {key: value for key, value in vars(own).items() if value is not None and key not in ("set", "secrets")}
    return dataclasses.replace(env, **said, set=env.set | own.set, secrets=env.secrets | own.secrets)


def python_here(profile: Profile, role: str) -> str:
    """Return the interpreter of a role's ranks, for a machine that has the cluster's files.

    It is "" in an image, and behind modules and shell lines, which may change what it finds.
    """
    env = environment_of(profile, role)
    if image_of(profile, role) or env.modules or env.setup or profile.hooks.prolog:
        return ""
    return env.python or sys.executable


def environments(profile: Profile) -> Iterator[tuple[str, Env]]:
    """Yield (key, environment) of the profile, and of each role that has anything otherwise."""
    yield "env", profile.env
    for name, role in profile.roles.items():
        if role.env != RoleEnv():
            yield f"roles.{name}.env", environment_of(profile, name)


def site_variables(profile: Profile) -> dict[str, str]:
    """Return the variables that network and storage become in each job."""
    network, storage = profile.network, profile.storage
    said = {
        "NCCL_SOCKET_IFNAME": network.interface,
        "GLOO_SOCKET_IFNAME": network.interface and network.interface.lstrip("="),
        "NCCL_IB_HCA": network.hca,
        "AFTEROK_SCRATCH": storage.scratch,
        "TMPDIR": storage.node_local,
    }
    return {name: value for name, value in said.items() if value}


def hub_cache(profile: Profile, role: str, environment: Mapping[str, str]) -> Path | None:
    """Return where a role's jobs look for files of the Hugging Face hub; None where shell lines of the site may say.

    A job has of the submitter's `environment` only what the profile forwards, but local processes have all of it. The
    order of the variables is that of huggingface_hub/constants.py.
    """
    env = environment_of(profile, role)
    if any("HF_" in line or "HUGGINGFACE" in line for line in [*env.setup, *profile.hooks.prolog]):
        return None
    sent = environment if profile.kind == "local" else {name: environment.get(name, "") for name in env.forward}
    said = {name: value for name, value in sent.items() if value} | site_variables(profile) | env.set
    if folder := said.get("HF_HUB_CACHE") or said.get("HUGGINGFACE_HUB_CACHE"):
        return expanded(folder)
    home = Path(said.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return expanded(said.get("HF_HOME") or home) / "hub"


def why_not_shared(profile: Profile, folder: Path) -> str:
    """Return why a run cannot lie in a folder, "" where it can, or where the profile does not say what is shared."""
    shared = [place for place in (profile.storage.scratch, *profile.storage.shared) if place]
    if profile.kind == "local" or not shared:
        return ""
    real = folder.resolve()
    if any(real.is_relative_to(expanded(place).resolve()) for place in shared):
        return ""
    return (
        f"{folder} is in no folder that profile {profile.meta.name} says all nodes share ({', '.join(shared)}); "
        "choose one there with --run DIR"
    )
