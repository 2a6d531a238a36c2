"""Create and close several process groups in one process, like a script that trains twice. Run with torchrun."""

import os
import time

import torch

from stratagem.dist import all_reduce, close_dist, get_rank, init_dist

for number in range(6):
    if number % 2 == int(os.environ["RANK"]):
        time.sleep(0.3)  # the other rank would find the remains of the previous group
    init_dist(timeout=20)
    value = torch.tensor([get_rank() + number])
    all_reduce(value)
    close_dist()
    if value.item() != 1 + 2 * number:
        raise SystemExit(f"group {number}: {value.item()}")
