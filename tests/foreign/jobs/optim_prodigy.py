"""Prodigy, which estimates its step size from sums over all parameters."""

from prodigyopt import Prodigy

from tests.foreign.digits import optimizer_job


def optimizer(model):
    return Prodigy(model.parameters(), lr=1.0, weight_decay=0.01, d0=1e-4)


# The estimate of the step size amplifies rounding.
JOB = optimizer_job("prodigyopt", "`Prodigy`, whose step size depends on all parameters", optimizer, tolerance=5e-4)
