"""A profile's extra_sbatch sets nothing that afterok sets, by whatever spelling sbatch would take."""

import pytest

from slurm.options import RESERVED, option_problems

ALLOWED = ("comment", "exclusive", "gres", "reservation", "mail-type", "mail_user", "nice", "exclude", "licenses", "wckey",
           "time-min", "switches", "gres-flags", "hint", "begin", "mem-bind", "network", "wait-all-nodes")  # fmt: skip


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


@pytest.mark.parametrize("key, value", [("comment", "a\n#SBATCH --output=/x"), ("comment=a\n#SBATCH --output", ""),
                                        ("x", "host"), ("", ""), ("no such", "1")])  # fmt: skip
def test_no_value_brings_a_line_of_its_own(key, value):
    assert problem_of(key, value)
