"""The rates on the page about learning rates are those that the schedules compute."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim import lr_scheduler as torch_schedules

from docs.site.stage import ROOT
from stratagem.optim import OptimWrapper, build_param_schedulers

UPDATES = 10
PAGE = (ROOT / "docs" / "learning-rates.md").read_text(encoding="utf-8")


def rates(make: Callable[[SGD], list[Any]]) -> list[float]:
    """Return the rate of each of ten updates, with an initial rate of 1."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedules = make(optimizer)
    used = []
    for _ in range(UPDATES):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for each in schedules:
            each.step()
    return used


def of_stratagem(spec: object) -> list[float]:
    return rates(lambda optimizer: build_param_schedulers(spec, OptimWrapper(optimizer), max_steps=UPDATES))  # type: ignore[arg-type, return-value]


def test_the_rates_of_warmup_and_cosine_on_the_page() -> None:
    """The first block of code is built, and its rates are those of the table below it."""
    code = re.search(r"```python\n(param_scheduler = .*?)```", PAGE, re.DOTALL)
    row = re.search(r"^\| rate \| (.*) \|$", PAGE, re.MULTILINE)
    assert code
    assert row
    values: dict[str, Any] = {}
    exec(code[1], values)
    assert of_stratagem(values["param_scheduler"]) == pytest.approx([float(v) for v in row[1].split("|")], abs=5e-4)


@pytest.mark.parametrize(
    ("spec", "make"),
    [
        (dict(type="ConstantLR", end=4), lambda o: torch_schedules.ConstantLR(o, 1 / 3, total_iters=3)),
        (dict(type="LinearLR", end=4), lambda o: torch_schedules.LinearLR(o, 1 / 3, 1.0, total_iters=3)),
        (dict(type="StepLR", step_size=3), lambda o: torch_schedules.StepLR(o, step_size=3)),
        (dict(type="MultiStepLR", milestones=[3, 7]), lambda o: torch_schedules.MultiStepLR(o, [3, 7])),
        (dict(type="ExponentialLR", gamma=0.9), lambda o: torch_schedules.ExponentialLR(o, 0.9)),
        (dict(type="CosineAnnealingLR"), lambda o: torch_schedules.CosineAnnealingLR(o, T_max=UPDATES)),
        (dict(type="PolyLR", power=2.0, end=UPDATES + 1), lambda o: torch_schedules.PolynomialLR(o, UPDATES, 2.0)),
    ],
    ids=lambda each: each["type"] if isinstance(each, dict) else "",
)
def test_the_schedulers_of_torch_that_the_page_lists_have_the_same_rates(
    spec: dict[str, Any], make: Callable[[SGD], Any]
) -> None:
    """Up to rounding, at each of ten updates."""
    assert of_stratagem(dict(spec, by="step")) == pytest.approx(rates(lambda o: [make(o)]), abs=1e-12)


def test_a_polynomial_decay_over_the_run_ends_with_a_rate_of_zero() -> None:
    """The last update of ``PolyLR`` without ``end`` has the rate ``eta_min``."""
    assert of_stratagem(dict(type="PolyLR", by="step"))[-1] == 0.0
