"""AdamW from heavyball with MARS variance reduction, without compilation."""

import heavyball

from tests.foreign.digits import optimizer_job

heavyball.utils.compile_mode = None


def optimizer(model):
    return heavyball.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01, mars=True)


JOB = optimizer_job("heavyball", "`AdamW(mars=True)`", optimizer, tolerance=1e-5)
