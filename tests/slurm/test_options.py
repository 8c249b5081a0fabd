"""A profile's extra_sbatch sets nothing that afterok sets, by whatever spelling sbatch would take."""

import pytest

from slurm.options import LONG_OPTIONS, RESERVED, SRUN_RESERVED, VARIABLES, option_problems, own_setting_problems
from slurm.profile.files import load
from slurm.profile.schema import Container, Env, Partition, Profile, Role, RoleEnv, Srun

ALLOWED = ("comment", "exclusive", "gres", "reservation", "mail-type", "mail_user", "nice", "exclude", "licenses",
           "wckey", "switches", "gres-flags", "hint", "begin", "mem-bind", "network",
           "wait-all-nodes")  # fmt: skip


def problem_of(key, value="x"):
    found = option_problems({key: value}, "p.yaml: partitions.gpu.extra_sbatch")
    assert len(found) <= 1 and all(one.where == f"p.yaml: partitions.gpu.extra_sbatch.{key}" for one in found)
    return found[0].message if found else ""


@pytest.mark.parametrize("option", RESERVED)
def test_what_afterok_sets_is_refused_in_each_spelling_that_sbatch_takes(option):
    spellings = {option, option.replace("-", "_"), f"--{option}", f"-{option}", f"{option}=x"}
    spellings |= {option[:length] for length in range(2, len(option))}  # sbatch takes an unambiguous beginning
    for key in spellings:
        assert problem_of(key), key
    assert RESERVED[option] in problem_of(option) and RESERVED[option] in problem_of(f"--{option}")


@pytest.mark.parametrize("option", ALLOWED)
def test_what_is_the_sites_alone_passes(option):
    assert problem_of(option) == problem_of(option, "") == ""


@pytest.mark.parametrize("option", sorted(LONG_OPTIONS - RESERVED.keys()))
def test_an_option_is_named_whole_so_that_whoever_looks_for_it_finds_it(option):
    for length in range(2, len(option)):
        if option[:length] not in LONG_OPTIONS:
            assert problem_of(option[:length]), option[:length]  # of ours, or of another with the same beginning
    assert problem_of(option, "5") == ""


def test_what_only_a_plugin_of_the_site_knows_passes_and_gpus_are_counted_elsewhere():
    assert problem_of("reserv").startswith("write the whole name of the option: reservation")
    assert problem_of("container-image") == problem_of("x11") == ""
    assert "say it as the partition's gres" in problem_of("gres", "gpu:8") and problem_of("gres", "nvme:1") == ""
    assert problem_of("time-min", "1:00:00") == "" and "no Slurm time" in problem_of("time-min", "soon")


@pytest.mark.parametrize("key, value", [("comment", "a\n#SBATCH --output=/x"), ("comment=a\n#SBATCH --output", ""),
                                        ("x", "host"), ("", ""), ("no such", "1")])  # fmt: skip
def test_no_value_brings_a_line_of_its_own(key, value):
    assert problem_of(key, value)


def test_a_profile_is_asked_for_all_that_is_ours_and_the_shipped_ones_set_none_of_it():
    shipped = ("dev", "local", "example", "plain", "h100_preemptible")
    assert [own_setting_problems(load(name), "p") for name in shipped] == [[]] * len(shipped)
    profile = Profile(
        partitions={"gpu": Partition(extra_sbatch={"t": "5"})},
        srun=Srun(extra=["--mpi=pmix", "-oX"]),
        env=Env(set={"PYTHONPATH": "/x", "OMP_NUM_THREADS": "1"}, forward=["MASTER_PORT", "WANDB_MODE"]),
    )
    assert [problem.where for problem in own_setting_problems(profile, "p")] == [
        "p: partitions.gpu.extra_sbatch.t",
        "p: srun.extra",
        "p: srun.extra",
        "p: env.set.PYTHONPATH",
        "p: env.forward.MASTER_PORT",
    ]


@pytest.mark.parametrize("option", SRUN_RESERVED)
def test_srun_gets_nothing_twice(option):
    dashed = f"-{option}" if len(option) == 1 else f"--{option}"
    for word in (dashed, f"{dashed}=x", dashed + "x" if len(option) == 1 else dashed[:-1]):
        assert own_setting_problems(Profile(srun=Srun(extra=[word])), "p"), word
    for word in ("--cpu-bind=cores", "--label", "-l", "--mem-bind=local", "--distribution=block", "--wait=60", "-vv"):
        assert not own_setting_problems(Profile(srun=Srun(extra=[word])), "p"), word
    assert VARIABLES


def test_the_words_for_pyxis_are_sruns_and_those_for_other_runtimes_are_not():
    def problems(runtime):
        said = Container(runtime=runtime, args=["--container-remap-root", "--output=/x"])
        return [problem.where for problem in own_setting_problems(Profile(container=said), "p")]

    assert problems("pyxis") == ["p: container.args"]
    assert problems("apptainer") == problems("none") == []


@pytest.mark.parametrize("name, value", [("X-Y", "1"), ("A B", "1"), ("1A", "1"), ("", "1"), ("A=B", "1"), ("UID", "5"),
                                         ("A", "nul\0")])  # fmt: skip
def test_what_no_shell_exports_is_refused_wherever_it_is_set(name, value):
    """`export X-Y=1` ends a job at its first line."""
    assert own_setting_problems(Profile(env=Env(set={name: value})), "p")
    by_role = Profile(roles={"cpu": Role(env=RoleEnv(set={name: value}))})
    assert [problem.where for problem in own_setting_problems(by_role, "p")] == [f"p: roles.cpu.env.set.{name}"]
    assert not own_setting_problems(Profile(env=Env(set={"_A1": "two\nlines, 'quoted'"})), "p")


@pytest.mark.parametrize("extra, wrong", [(["hostname"], 1), (["--label", "--"], 1), (["--wait=60", "x"], 1),
                                          (["--wait", "60", "x"], 1), (["--wait", "60", "-l"], 0)])  # fmt: skip
def test_no_word_for_srun_is_its_command(extra, wrong):
    assert len(own_setting_problems(Profile(srun=Srun(extra=extra)), "p")) == wrong
