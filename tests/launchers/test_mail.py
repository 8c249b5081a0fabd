"""The mail of a pipeline, as a real Slurm sends it: one at its end and one a failure, not one a phase or an element."""

import time

import pytest

from tests.cluster import cluster_for_a_while, require_packages
from tests.command import afterok, wait_for, write_toy

SITE = "extends: [dev]\nmail: {user: me@example.org}\n"


@pytest.mark.soak
def test_a_real_slurm_sends_one_mail_at_the_end_and_one_of_a_failure(tmp_path):
    require_packages()
    told, program = tmp_path / "mails", tmp_path / "mail"
    program.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    program.chmod(0o755)
    (tmp_path / "site.yaml").write_text(SITE)
    pipeline = write_toy(tmp_path)
    with cluster_for_a_while(nodes=2, settings={"MailProg": str(program)}) as cluster:
        words = (pipeline, f"cluster={tmp_path / 'site.yaml'}", "--run", tmp_path / "run")
        afterok("run", *words, "numbers.with.fail_at=1", env=cluster.env(), check=1)
        (failed,) = wait_for("a mail of the failure", lambda: told.exists() and told.read_text().splitlines())
        assert "-s Slurm" in failed and "numbers.run.a1" in failed and failed.endswith("me@example.org"), failed
        afterok("run", *words, env=cluster.env())  # goes on: what waits keeps its job, and its mail
        wait_for("a mail of the end", lambda: len(told.read_text().splitlines()) > 1)
        time.sleep(3)  # no other comes
        first, ended = told.read_text().splitlines()
        assert first == failed and "again.run.a1" in ended and "Ended" in ended, told.read_text()
