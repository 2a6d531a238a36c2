"""Muon from pytorch-optimizer, which orthogonalizes the updates of matrices."""

from pytorch_optimizer import Muon

from tests.foreign.digits import optimizer_job


def optimizer(model):
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    groups = [dict(params=matrices, use_muon=True), dict(params=others, use_muon=False)]
    return Muon(groups, lr=5e-3, weight_decay=0.01, adamw_lr=1e-3)


JOB = optimizer_job(
    "pytorch-optimizer", "`Muon`, which orthogonalizes the updates of matrices", optimizer, tolerance=1e-4
)
