"""A StatefulDataLoader from torchdata with two workers, on the wine dataset from scikit-learn, with several metrics."""

import warnings

import torch
from sklearn.datasets import load_wine
from sklearn.preprocessing import scale
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

from stratagem import Runner, SupervisedModel
from tests.foreign.job import ByHand, Job

BATCH, EPOCHS = 16, 4


def data():
    """The last of five batches of an epoch is smaller."""
    features, labels = load_wine(return_X_y=True)
    features, labels = torch.tensor(scale(features), dtype=torch.float32), torch.tensor(labels)
    return TensorDataset(features[::2][:74], labels[::2][:74]), TensorDataset(features[1::2], labels[1::2])


def loader(samples, batch_size, **options):
    with warnings.catch_warnings():
        # torchdata calls a function that torch has deprecated.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
        return StatefulDataLoader(samples, batch_size, **options)


def training(samples, batch_size):
    order = torch.Generator().manual_seed(1)
    return loader(samples, batch_size, shuffle=True, generator=order, num_workers=2)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 16), nn.Tanh(), nn.Linear(16, 3))


def metrics():
    return {"auroc": MulticlassAUROC(3), "f1": MulticlassF1Score(3, average="weighted")}


def train(batch_size, **options):
    samples, validation = data()
    model = network()
    runner = Runner(
        model=SupervisedModel(model, nn.CrossEntropyLoss()),
        train_dataloader=training(samples, batch_size),
        optim_wrapper=torch.optim.Adam(model.parameters(), lr=1e-3),
        train_cfg=dict(max_epochs=EPOCHS),
        val_dataloader=loader(validation, 20),
        val_cfg=dict(),
        val_evaluator=metrics(),
        **options,
    )
    runner.train()
    return runner, model


def by_hand(record: ByHand):
    return by_hand_with(record, metrics(), "", EPOCHS)


def by_hand_with(record: ByHand, values, prefix, epochs):
    """Train and evaluate named metrics, which are recorded with a prefix."""
    samples, validation = data()
    model = network()
    optim = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = training(samples, BATCH)
    for _ in range(epochs):
        for features, labels in batches:
            record.samples((features, labels))
            nn.functional.cross_entropy(model(features), labels).backward()
            optim.step()
            optim.zero_grad()
        for metric in values.values():
            metric.reset()
        with torch.no_grad():
            for features, labels in loader(validation, 20):
                for metric in values.values():
                    metric.update(model(features), labels)
        record.metrics(**{prefix + name: metric.compute() for name, metric in values.items()})
    return model


JOB = Job(
    packages=("torchdata", "torchmetrics", "scikit-learn"),
    summary="a `StatefulDataLoader` with two workers and a smaller last batch; AUROC and F1 score, each with a name",
    train=train,
    by_hand=by_hand,
    batch=BATCH,
    tolerance=1e-5,
    metric_tolerance=1e-4,
)
