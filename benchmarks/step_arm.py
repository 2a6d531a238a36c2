"""Train one job with one engine, in blocks that ``step.py`` requests. It is started by ``step.py``."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from dataclasses import replace

import torch
from step_arms.gate import Stop, TimeGate
from step_arms.jobs import ALL_JOBS
from torch import nn


def main() -> None:
    """Train until the requests end."""
    torch.set_num_threads(1)
    engine, name, block, answers = sys.argv[1:]
    job = ALL_JOBS[name]
    networks: list[nn.Module] = []

    def network() -> nn.Module:
        networks.append(job.model())
        return networks[-1]

    train = importlib.import_module(f"step_arms.{engine}").train
    gate = TimeGate(int(block), int(answers), lambda: networks[-1])
    with contextlib.suppress(Stop):
        train(replace(job, model=network), gate, int(os.environ.get("RANK", "0")))


if __name__ == "__main__":
    main()
    os._exit(0)  # Do not wait for other ranks.
