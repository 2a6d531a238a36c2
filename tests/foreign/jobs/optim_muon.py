"""Muon from pytorch-optimizer, which orthogonalizes the updates of matrices."""

import functools

from pytorch_optimizer import Muon

from tests.foreign.digits import by_hand, optimizer_job


def optimizer(model):
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    groups = [dict(params=matrices, use_muon=True), dict(params=others, use_muon=False)]
    return Muon(groups, lr=5e-3, weight_decay=0.01, adamw_lr=1e-3)


# Muon iterates in bfloat16, where a gradient that is rounded differently in the last bit of float32 can change an update by
# a percent. So two ranks are compared with a loop that rounds as they do: it averages the gradients of two halves of a batch.
JOB = optimizer_job(
    "pytorch-optimizer",
    "`Muon`, which orthogonalizes the updates of matrices; on two ranks, compared with a loop over two halves of each batch",
    optimizer,
    by_hand_on_two=functools.partial(by_hand, optimizer, ranks=2),
    tolerance=1e-6,
)
