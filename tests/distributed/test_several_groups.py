"""A process that trains twice creates two process groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("several_groups.py")


@pytest.mark.slow
@pytest.mark.parametrize("agent_serves", [True, False], ids=["store-of-torchrun", "store-of-rank-0"])
def test_a_second_group_of_the_same_processes_does_not_hang(agent_serves: bool) -> None:
    """The ranks of six successive groups connect even if one of them is late, and no group reads the state of an earlier one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not agent_serves:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    done = subprocess.run(
        [*launch, "--nproc-per-node", "2", str(SCRIPT)], env=environment, timeout=120, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
