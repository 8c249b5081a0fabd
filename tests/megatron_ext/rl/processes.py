"""The toy run of GRPO in ranks that can be killed. megatron-core is not imported here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.command import ROOT
from tests.megatron_ext import gloo


def in_ranks_of_their_own(
    hf: Path, keep: Path, deaths: list[Any], **arguments: Any
) -> list[subprocess.CompletedProcess]:
    """Once a rank ended badly the others are killed, as srun does."""
    port = gloo.free_port()
    ranks = [
        subprocess.Popen(
            [
                sys.executable, "-m", "tests.megatron_ext.rl.toy", str(hf), str(keep), json.dumps(death),
                json.dumps(arguments),
            ],
            env={**os.environ, **gloo.environment(rank, len(deaths), port)}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank, death in enumerate(deaths)
    ]  # fmt: skip
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            time.sleep(0.1)
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    return [subprocess.CompletedProcess(p.args, p.returncode, *p.communicate()) for p in ranks]
