"""Lion from lion-pytorch, as a configuration with the class as its type."""

from lion_pytorch import Lion

from tests.foreign.digits import optimizer_job


def optimizer(model):
    return Lion(model.parameters(), lr=1e-3, weight_decay=0.1)


JOB = optimizer_job(
    "lion-pytorch",
    "`Lion` as `dict(type=Lion, ...)`",
    optimizer,
    lambda model: dict(optimizer=dict(type=Lion, lr=1e-3, weight_decay=0.1)),
    # A sign that rounding changes moves a weight by 2 * lr.
    tolerance=2e-3,
)
