"""A vision transformer from timm whose averaged weights are validated, next to timm's ModelEmaV3."""

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy

from stratagem import Runner, SupervisedModel
from stratagem.train import EMAHook
from tests.foreign.job import ByHand, Job
from tests.foreign.jobs.timm_vit import data, network

BATCH, EPOCHS, DECAY = 40, 2, 0.9


def train(batch_size, *, custom_hooks, **options):
    training, validation = data()
    model = network()
    runner = Runner(
        model=SupervisedModel(model, nn.CrossEntropyLoss()),
        train_dataloader=DataLoader(Subset(training, range(200)), batch_size),
        optim_wrapper=torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6),
        train_cfg=dict(max_epochs=EPOCHS),
        val_dataloader=DataLoader(validation, 100),
        val_cfg=dict(),
        val_evaluator=MulticlassAccuracy(10, average="micro"),
        custom_hooks=[EMAHook(momentum=1 - DECAY), *custom_hooks],
        **options,
    )
    runner.train()
    return runner, model


def by_hand(record: ByHand):
    training, validation = data()
    model, average = network(), None
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    for _ in range(EPOCHS):
        model.train()
        for images, labels in DataLoader(Subset(training, range(200)), BATCH):
            record.samples((images, labels))
            nn.functional.cross_entropy(model(images), labels).backward()
            optim.step()
            optim.zero_grad()
            # EMAHook starts with the weights after the first step, timm with those before it.
            if average is None:
                average = ModelEmaV3(model, decay=DECAY)
            else:
                average.update(model)
        average.eval()
        accuracy = MulticlassAccuracy(10, average="micro")
        with torch.no_grad():
            for images, labels in DataLoader(validation, 100):
                accuracy.update(average(images), labels)
        record.metrics(multiclassaccuracy=accuracy.compute())
    return model


JOB = Job(
    packages=("timm", "mlxtend", "torchmetrics"),
    summary="a vision transformer; validations use `EMAHook`, compared with `ModelEmaV3`",
    train=train,
    by_hand=by_hand,
    batch=BATCH,
    tolerance=1e-5,
)
