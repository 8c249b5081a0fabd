"""The README's two commands are the ones that CI and users run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_ci_runs_the_readmes_test_command():
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.M)
    assert commands[0] == "pip install -c constraints.txt -e . && afterok run jobs/pipelines/tiny.yaml"
    assert commands[1] in (ROOT / ".ci/run").read_text()


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"jobs/pipelines/\w+\.yaml", text):
        assert (ROOT / path).exists(), path
