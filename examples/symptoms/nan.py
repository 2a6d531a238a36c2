"""One sample of the data is NaN: the error names it."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stratagem import Runner, StratagemError, SupervisedModel

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(200, 4, generator=generator)
targets = inputs.sum(dim=1, keepdim=True)
inputs[137, 2] = torch.nan

runner = Runner(
    model=SupervisedModel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), nn.MSELoss()),
    work_dir="work_dirs/nan",
    train_dataloader=DataLoader(TensorDataset(inputs, targets), batch_size=20, shuffle=True),
    train_cfg=dict(max_epochs=1),
    optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)),
    randomness=dict(seed=0),
    log_level="ERROR",
)
try:
    runner.train()
except StratagemError as error:
    print(error)
    print(f"the bad sample is in the list: {'137' in str(error)}")
