"""A residual network from timm with BatchNorm, whose statistics each rank computes from its own samples."""

import functools

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from stratagem import Runner, SupervisedModel
from tests.foreign.job import ByHand, Job
from tests.foreign.jobs import timm_vit

BATCH, EPOCHS = 40, 2


def data():
    """In float64, because BatchNorm amplifies the rounding errors of float32 to 0.06 in these few steps."""
    training, validation = ((images.double(), labels) for images, labels in (each.tensors for each in timm_vit.data()))
    return TensorDataset(*(each[:500:2] for each in training)), TensorDataset(*validation)


def network():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", in_chans=1, num_classes=10).double()


def optimizer(model):
    return create_optimizer_v2(model, opt="sgd", lr=0.02, momentum=0.9, weight_decay=1e-4)


def loader(samples, batch_size):
    order = torch.Generator().manual_seed(1)
    return DataLoader(samples, batch_size, shuffle=True, generator=order, drop_last=True)


def train(batch_size, **options):
    training, validation = data()
    model = network()
    runner = Runner(
        model=SupervisedModel(model, nn.CrossEntropyLoss()),
        train_dataloader=loader(training, batch_size),
        optim_wrapper=optimizer(model),
        train_cfg=dict(max_epochs=EPOCHS),
        val_dataloader=DataLoader(validation, 100),
        val_cfg=dict(),
        val_evaluator=MulticlassAccuracy(10, average="micro"),
        **options,
    )
    runner.train()
    return runner, model


def by_hand(record: ByHand, ranks=1):
    """Train with the mean of the gradients of ``ranks`` copies; each copy takes every n-th sample and has its own statistics."""
    training, validation = data()
    copies = [network() for _ in range(ranks)]
    model = copies[0]
    optim = optimizer(model)
    batches = loader(training, BATCH)
    for _ in range(EPOCHS):
        for each in copies:
            each.train()
        for images, labels in batches:
            record.samples((images, labels))
            for rank, each in enumerate(copies):
                nn.functional.cross_entropy(each(images[rank::ranks]), labels[rank::ranks]).backward()
            for weights in zip(*(each.parameters() for each in copies), strict=True):
                weights[0].grad = sum(weight.grad for weight in weights) / ranks
            optim.step()
            for weights in zip(*(each.parameters() for each in copies), strict=True):
                for weight in weights:
                    weight.data.copy_(weights[0].data)
                    weight.grad = None
        model.eval()
        accuracy = MulticlassAccuracy(10, average="micro")
        with torch.no_grad():
            for images, labels in DataLoader(validation, 100):
                accuracy.update(model(images), labels)
        record.metrics(multiclassaccuracy=accuracy.compute())
    return model


JOB = Job(
    packages=("timm", "mlxtend", "torchmetrics"),
    summary="a residual network with BatchNorm, in float64; on two ranks, compared with a loop over two copies of the model",
    train=train,
    by_hand=by_hand,
    by_hand_on_two=functools.partial(by_hand, ranks=2),
    batch=BATCH,
    tolerance=1e-9,
)
