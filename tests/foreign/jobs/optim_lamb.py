"""Lamb from pytorch-optimizer, whose step depends on the norm of each parameter."""

from pytorch_optimizer import Lamb

from tests.foreign.digits import optimizer_job


def optimizer(model):
    return Lamb(model.parameters(), lr=2e-2, weight_decay=0.01)


JOB = optimizer_job(
    "pytorch-optimizer",
    "`Lamb`, whose steps depend on the norm of each parameter",
    optimizer,
    tolerance=1e-5,
)
