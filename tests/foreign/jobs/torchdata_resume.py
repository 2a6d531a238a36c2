"""A run with a StatefulDataLoader that is interrupted within an epoch, and resumed with new objects."""

import os
import signal

import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from stratagem import Hook, Runner, SupervisedModel
from tests.foreign.job import ByHand, Job
from tests.foreign.jobs.torchdata_stateful import BATCH, by_hand_with, data, loader, network, training

# An epoch has five iterations, and the signal arrives in the second one.
EPOCHS, INTERRUPTED = 3, 7


def metrics():
    return MetricCollection({"accuracy": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)})


class Preempted(Hook):
    """Sends the signal with which schedulers stop a job."""

    def after_train_iter(self, run, batch_idx, data_batch=None, outputs=None):
        if run.iter + 1 == INTERRUPTED:
            os.kill(os.getpid(), signal.SIGTERM)


def build(batch_size, **options):
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
    return runner, model


def train(batch_size, *, custom_hooks, **options):
    interrupted, _ = build(batch_size, custom_hooks=[Preempted(), *custom_hooks], **options)
    try:
        interrupted.train()
    except SystemExit as stopped:
        assert stopped.code == 128 + signal.SIGTERM
    else:
        raise AssertionError("The run was not interrupted.")
    finally:
        interrupted.close()
    runner, model = build(batch_size, custom_hooks=custom_hooks, resume=True, **options)
    runner.train()
    return runner, model


def by_hand(record: ByHand):
    """Train without an interruption."""
    return by_hand_with(record, metrics(), "metriccollection/", EPOCHS)


JOB = Job(
    packages=("torchdata", "torchmetrics", "scikit-learn"),
    summary="a run with a `StatefulDataLoader` that is interrupted within an epoch and resumed, and a `MetricCollection`",
    train=train,
    by_hand=by_hand,
    batch=BATCH,
    tolerance=1e-5,
    metric_tolerance=1e-4,
)
