"""Averaged weights, mixed precision, early stopping, the best checkpoint and TensorBoard in one run."""

from pathlib import Path

import torch
from data import digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from stratagem import Runner, SupervisedModel, load_checkpoint
from stratagem.checkpoint import evaluated_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


if __name__ == "__main__":
    torch.manual_seed(0)  # for the initial weights
    runner = Runner(
        model=SupervisedModel(network(), nn.CrossEntropyLoss()),
        work_dir="work_dirs/usual",
        train_dataloader=DataLoader(digits(), batch_size=50, shuffle=True),
        train_cfg=dict(max_epochs=50),
        optim_wrapper=dict(
            type="AmpOptimWrapper",
            dtype="bfloat16",
            optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.05),
            clip_grad=dict(max_norm=1.0),
        ),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by="step", begin=0, end=20),
            dict(type="CosineAnnealingLR", by="step", begin=20),
        ],
        val_dataloader=DataLoader(digits(start=3, step=10), batch_size=250),
        val_cfg=dict(),
        val_evaluator=dict(type="Accuracy", task="multiclass", num_classes=10),
        default_hooks=dict(checkpoint=dict(interval=1, max_keep_ckpts=2, save_best="accuracy")),
        custom_hooks=[
            dict(type="EMAHook", momentum=0.05),  # validations use the averaged weights
            dict(type="EarlyStoppingHook", monitor="accuracy", patience=3, min_delta=0.001),
            dict(type="TensorboardHook", folder="work_dirs/usual/tensorboard"),
        ],
        randomness=dict(seed=0),
    )
    runner.train()
    runner.close()
    print(f"stopped early: {runner.run.epoch < 50}")

    (best,) = Path("work_dirs/usual").glob("best_accuracy_epoch_*")
    model = SupervisedModel(network(), nn.CrossEntropyLoss())
    checkpoint, _ = load_checkpoint(model, best)  # the trained weights
    model.load_state_dict(
        evaluated_weights(checkpoint, checkpoint["state_dict"])
    )  # the averaged weights, with which the run was validated
    images, labels = digits(start=3, step=10).tensors
    with torch.no_grad():
        accuracy = (model.network.eval()(images).argmax(dim=1) == labels).float().mean()
    print(f"best checkpoint: accuracy {accuracy:.2f}")

    events = EventAccumulator("work_dirs/usual/tensorboard").Reload()
    print(f"TensorBoard has the accuracy of each epoch: {len(events.Scalars('val/accuracy')) == runner.run.epoch}")
