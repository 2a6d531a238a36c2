"""A network from timm, trained on real digits, with the schedule and the loss of a timm training."""

import timm
import torch
from data import digits
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader

from stratagem import Runner, SupervisedModel

if __name__ == "__main__":
    # With network access: timm.create_model("resnet18.a1_in1k", pretrained=True, in_chans=1, num_classes=10)
    torch.manual_seed(0)  # for the initial weights
    network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    runner = Runner(
        model=SupervisedModel(network, LabelSmoothingCrossEntropy(0.1)),
        work_dir="work_dirs/timm",
        train_dataloader=DataLoader(digits(step=2), batch_size=50, shuffle=True, drop_last=True),
        train_cfg=dict(max_epochs=4, val_interval=4),
        # Without weight decay of biases and norms.
        optim_wrapper=create_optimizer_v2(network, opt="adamw", lr=5e-3, weight_decay=0.05),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.05, by="step", begin=0, end=50),
            dict(type="CosineAnnealingLR", by="step", begin=50),
        ],
        val_dataloader=DataLoader(digits(start=1, step=10), batch_size=250),
        val_cfg=dict(),
        val_evaluator=dict(type="Accuracy", task="multiclass", num_classes=10),
        randomness=dict(seed=0),
    )
    runner.train()
    runner.close()
    rates = runner.run.optim_wrapper.optimizer.param_groups
    print(f"parameter groups: {len(rates)}")
    print(f"accuracy: {runner.run.metrics['accuracy']:.2f}")
