"""Train one job with one engine, in blocks that ``step.py`` requests. It is started by ``step.py``."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys

import torch
from step_arms.gate import Stop, TimeGate
from step_arms.jobs import JOBS

if __name__ == "__main__":
    torch.set_num_threads(1)
    engine, job, block, answers = sys.argv[1:]
    train = importlib.import_module(f"step_arms.{engine}").train
    with contextlib.suppress(Stop):
        train(JOBS[job], TimeGate(int(block), int(answers)), int(os.environ.get("RANK", "0")))
    os._exit(0)  # Do not wait for other ranks.
