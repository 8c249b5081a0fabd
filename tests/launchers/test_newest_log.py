"""Which log `afterok logs` shows, and what it says where there is none."""

import pytest

from data_tools.mistake import UserMistake
from launchers.observe.logs import newest_log
from launchers.planning.ledger import Ledger
from tests.launchers.planted_run import failed


def test_an_element_that_does_not_exist_is_told_from_one_without_a_log_yet(tmp_path):
    run = failed(tmp_path / "run").run
    entry = Ledger(run.ledger).jobs()[0]
    with pytest.raises(UserMistake, match=rf"{entry.phase} has elements 0 to {max(entry.elements)}, not 77; see"):
        newest_log(run, entry.phase, 77)
