"""Three learning rates, each validated on three folds: a loop over runners in one program."""

from statistics import mean

import torch
from data import digits
from torch import nn
from torch.utils.data import DataLoader, Subset

from stratagem import Runner, SupervisedModel

FOLDS = 3


def train(data, lr: float, fold: int) -> float:
    """Train on all folds but one, and return the accuracy on that fold."""
    held_out = list(range(fold, len(data), FOLDS))
    rest = [index for index in range(len(data)) if index % FOLDS != fold]
    torch.manual_seed(fold)  # for the initial weights
    runner = Runner(
        model=SupervisedModel(
            nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10)), nn.CrossEntropyLoss()
        ),
        work_dir=f"work_dirs/sweep/lr_{lr}/fold_{fold}",
        train_dataloader=DataLoader(Subset(data, rest), batch_size=32, shuffle=True),
        train_cfg=dict(max_epochs=3, val_interval=3),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=lr)),
        val_dataloader=DataLoader(Subset(data, held_out), batch_size=200),
        val_cfg=dict(),
        val_evaluator=dict(type="Accuracy", task="multiclass", num_classes=10),
        default_hooks=dict(checkpoint=None),
        randomness=dict(seed=fold),
        log_level="WARNING",
    )
    runner.train()
    runner.close()
    return runner.run.metrics["accuracy"]


if __name__ == "__main__":
    data = digits()
    results = {lr: mean(train(data, lr, fold) for fold in range(FOLDS)) for lr in (0.0003, 0.003, 0.3)}
    for lr, accuracy in results.items():
        print(f"lr {lr}: mean accuracy {accuracy:.2f}")
    print(f"best: lr {max(results, key=results.get)}")
