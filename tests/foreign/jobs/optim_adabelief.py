"""AdaBelief, with parameter groups that the user built."""

from adabelief_pytorch import AdaBelief

from tests.foreign.digits import optimizer_job


def optimizer(model):
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    groups = [dict(params=matrices, weight_decay=0.01), dict(params=others, weight_decay=0.0)]
    return AdaBelief(groups, lr=1e-2, eps=1e-12, rectify=True, print_change_log=False)


JOB = optimizer_job("adabelief-pytorch", "`AdaBelief` with two parameter groups", optimizer, tolerance=1e-5)
