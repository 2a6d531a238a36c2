"""Record the samples and results of each rank, to compare launchers."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import torch
from digits import Digits

from stratagem.registry import HOOKS
from stratagem.train import Hook


def fingerprint(image: torch.Tensor) -> bytes:
    """Return a hash of an image's pixels."""
    return hashlib.sha256(image.contiguous().numpy().tobytes()).digest()


@HOOKS.register_module()
class Recorder(Hook):
    """A hook that records the losses and samples, and writes them with the weights to ``rank_<r>.json`` after training.

    Samples are identified by their pixels, so the record shows what the model received. Each iteration also appends a
    line to ``progress_<r>``, so that a test can wait for it. With ``die_at``, rank 1 kills itself once after that many
    iterations. ``pause_s`` slows down each iteration, so that a test can act in time.
    """

    def __init__(self, die_at: int | None = None, pause_s: float = 0.0) -> None:
        self.die_at = die_at
        self.pause_s = pause_s
        self.losses: list[str] = []
        self.samples: list[list[int]] = []
        self.numbers: dict[bytes, int] = {}

    def before_train(self, run: Any) -> None:
        images = Digits(held_out=False).images
        self.numbers = {fingerprint(image): number for number, image in enumerate(images)}

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        images, _ = data_batch
        self.losses.append(float(outputs["loss"]).hex())
        self.samples.append([self.numbers[fingerprint(image)] for image in images])
        with Path(run.work_dir, f"progress_{run.rank}").open("a") as lines:
            lines.write(f"{run.iter}\n")
        time.sleep(self.pause_s)
        died = Path(run.work_dir, "died")
        if run.rank == 1 and len(self.losses) == self.die_at and not died.exists():
            died.write_text(f"after {self.die_at} iterations")
            os.kill(os.getpid(), signal.SIGKILL)

    def after_train(self, run: Any) -> None:
        state = run.strategy.unwrap_model().state_dict()
        weights = {name: value.flatten().tolist() for name, value in state.items()}
        record = {
            "rank": run.rank,
            "size": run.world_size,
            "launcher": run.world.launcher,
            "host": socket.gethostname(),
            "last": run.iter,
            "losses": self.losses,
            "samples": self.samples,
            "weights": weights,
        }
        Path(run.work_dir, f"rank_{run.rank}.json").write_text(json.dumps(record))
