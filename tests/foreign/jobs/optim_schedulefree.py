"""AdamW from schedulefree, whose weights for evaluation differ from those for training."""

from schedulefree import AdamWScheduleFree

from tests.foreign.digits import optimizer_job


def optimizer(model):
    return AdamWScheduleFree(model.parameters(), lr=5e-3, weight_decay=0.01, warmup_steps=10)


JOB = optimizer_job(
    "schedulefree",
    "`AdamWScheduleFree`, whose weights for evaluation differ from those for training",
    optimizer,
    tolerance=2e-5,
)
