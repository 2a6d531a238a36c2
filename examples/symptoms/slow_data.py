"""The same training with slow data, without and with data workers: how long an iteration waits for data."""

import json
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from stratagem import Runner, SupervisedModel


class Slow(Dataset):
    """Each sample takes 5 ms, as if an image was decoded."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int):
        time.sleep(0.005)
        return torch.randn(512), torch.zeros(1)


def times(workers: int) -> tuple[float, float]:
    """Train two epochs, and return the time of an iteration of the last one, and how much of it waited for data."""
    folder = Path(f"work_dirs/slow_{workers}")
    runner = Runner(
        model=SupervisedModel(nn.Linear(512, 1), nn.MSELoss()),
        work_dir=folder,
        train_dataloader=DataLoader(Slow(), batch_size=10, num_workers=workers, persistent_workers=workers > 0),
        train_cfg=dict(max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)),
        default_hooks=dict(checkpoint=None, logger=dict(interval=10)),
    )
    runner.train()
    runner.close()
    (file,) = folder.glob("*/vis_data/scalars.json")
    record = [line for line in map(json.loads, file.read_text().splitlines()) if line["mode"] == "train"][-1]
    return record["time"], record["data_time"]


if __name__ == "__main__":
    total, waited = times(workers=0)
    _, waited_with_workers = times(workers=2)
    print(f"without workers, most of an iteration waits: {waited > 0.5 * total}")
    print(f"with workers, it waits for a shorter time: {waited_with_workers < waited}")
