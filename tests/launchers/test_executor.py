"""The sbatch script is a pure function of plan and profile; its golden text is what an admin reads."""

from pathlib import Path

from jobs.pipeline import load_pipeline
from jobs.run_folder import RunFolder
from launchers.backend import JobSpec
from launchers.executor import PhaseExecutor, index_ranges, phase_command, phase_parameters
from launchers.plan import make_plan
from slurm.client import Slurm
from slurm.detect import Cluster
from slurm.profile import load
from tests.command import write_toy

GOLDEN = """#!/bin/bash

# Parameters
#SBATCH --account=llm
#SBATCH --array=0,2
#SBATCH --chdir=/run/toy
#SBATCH --constraint=h100
#SBATCH --cpus-per-task=12
#SBATCH --dependency=afterok:41,aftercorr:42
#SBATCH --exclusive
#SBATCH --export=WANDB_MODE
#SBATCH --gpus-per-node=8
#SBATCH --job-name=toy.numbers.a3.cafe
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=1843200M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/run/toy/numbers/logs/a3.%a.out
#SBATCH --partition=gpu
#SBATCH --qos=normal
#SBATCH --signal=USR2@90
#SBATCH --time=1440

# setup
set -euo pipefail
export SLURM_EXPORT_ENV=ALL PATH HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"
module load cuda/12.8
export NCCL_SOCKET_IFNAME=ib0
export HF_HOME=/shared/hf
ulimit -l unlimited
export PYTHONPATH=/run/toy/submissions/3/code PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$node" --oneliner | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
resolved=$(getent ahostsv4 "${address:-$node}" | awk 'NR == 1 {print $1}' || true)
export MASTER_ADDR="${resolved:-${address:-$node}}"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# command
export SUBMITIT_EXECUTOR=slurm
srun --kill-on-bad-exit=1 --export=ALL --unbuffered --cpus-per-task=12 --mpi=none --cpu-bind=cores /shared/afterok/venv/bin/python \
-m jobs.worker /run/toy numbers --submission 3
"""


def test_the_script_of_a_gpu_phase_is_this_text(tmp_path, monkeypatch):
    monkeypatch.setattr(PhaseExecutor, "affinity", classmethod(lambda cls: 2))  # no srun needed to build a text
    profile = load("example")
    pipeline = load_pipeline(write_toy(tmp_path), ["numbers.resources.role=train", "numbers.resources.nodes=2"])
    run = RunFolder(Path("/run/toy"))
    planned = make_plan(pipeline, run, Cluster("slurm", profile, {}, "example")).phases[0]
    spec = JobSpec(planned, [0, 2], {"a": "afterok", "b": "aftercorr"})
    parameters = phase_parameters(profile, run, 3, spec, {"a": "41", "b": "42"}, "cafe")
    executor = PhaseExecutor(tmp_path, tmp_path / "x.sh", Slurm({}))
    executor.parameters = {key: value for key, value in parameters.items() if value is not None or key == "wckey"}
    text = executor._make_submission_file_text(phase_command(profile, run, 3, spec), "")
    assert text == GOLDEN


def test_chosen_indices_are_spelled_as_slurm_spells_them():
    assert index_ranges([7, 3, 8, 9, 20]) == "3,7-9,20"
    assert index_ranges(range(4)) == "0-3"
