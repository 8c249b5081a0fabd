"""mamba-ssm's own kernels, in Triton's interpreter, beside our Mamba layer: documents, states, gradients.

Where no package index answers, or it has no Triton for this machine, these tests are skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext import versions
from tests.gpu_rehearsal.interpreted import LENGTHS
from tests.gpu_rehearsal.releases import installed, unpacked
from tests.megatron_ext.rounding import MARGIN

pytestmark = pytest.mark.rehearsal

TRITON = "3.9.0"  # its interpreter works with numpy 2.4; 3.6's does not


@pytest.fixture(scope="session")
def found() -> dict:
    """What interpreted.py prints."""
    sources = unpacked("mamba_ssm", versions.release().partners.mamba_ssm, wheel=False)
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(installed("triton", TRITON)), str(root)])
    command = [sys.executable, "-m", "tests.gpu_rehearsal.interpreted", str(sources)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["documents after a state", "documents after a state of none"])
def test_the_kernels_compute_what_torch_computes_with_documents_and_a_state_together(found, case):
    assert len(found[case]) == 10 and {name: far for name, far in found[case].items() if not far <= 1} == {}


def test_in_half_precision_they_differ_by_their_roundings(found):
    """What is rounded on the way: the convolved inputs, states of chunks, products of B and C, outputs, gradients."""
    assert len(found["in half"]) == 10
    assert {name: far for name, far in found["in half"].items() if not far <= MARGIN} == {}


def test_a_state_of_no_document_of_the_row_is_not_used(found):
    assert found["state of none"] == [False, False]


def test_no_gradient_of_a_document_reaches_another_or_a_state_that_is_not_its_own(found):
    numbers = range(len(LENGTHS))
    assert found["reached"] == [[number == 0] * 2 + [number == other for other in numbers] for number in numbers]


def test_the_decoding_kernel_goes_on_as_torch_does(found):
    assert found["decoding"] <= 1
