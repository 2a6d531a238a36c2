"""The migration examples: the losses of a training with another library and with Stratagem are equal."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Lightning and transformers import torchvision if it is installed.
import tests.foreign.torchvision_ops  # noqa: F401
from examples.migration import from_a_loop, from_accelerate, from_hf_trainer, from_lightning
from examples.migration.shared import Losses

pytestmark = [
    pytest.mark.foreign,
    pytest.mark.timeout(900),
    # Deprecated functions that these libraries call.
    pytest.mark.filterwarnings("ignore"),
]


def with_a_loop() -> tuple[list[float], list[float], float]:
    before: list[float] = []
    after = Losses()
    gap = from_a_loop.before(before) - from_a_loop.after(after)
    return before, after.values, gap


def with_lightning() -> tuple[list[float], list[float], float]:
    after = Losses()
    before, accuracy = from_lightning.before()
    return before, after.values, accuracy - from_lightning.after(after)


def with_accelerate() -> tuple[list[float], list[float], float]:
    before: list[float] = []
    after = Losses()
    theirs, ours = from_accelerate.before(before), from_accelerate.after(after)
    return (
        before,
        after.values,
        max(float((a - b).abs().max()) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True)),
    )


def with_hf_trainer() -> tuple[list[float], list[float], float]:
    before: list[float] = []
    model, after = from_hf_trainer.pretrained(), Losses()
    model.register_forward_hook(lambda module, args, output: before.append(output.loss.item()))
    from_hf_trainer.before(model)
    from_hf_trainer.after(from_hf_trainer.pretrained(), after)
    return before, after.values, 0.0


@functools.cache
def results(run: Callable[[], tuple[list[float], list[float], float]]) -> tuple[list[float], list[float], float]:
    return run()


@pytest.mark.parametrize(
    "run", [with_a_loop, with_lightning, with_accelerate, with_hf_trainer], ids=lambda run: run.__name__
)
def test_the_first_20_losses_are_equal(
    run: Callable[[], tuple[list[float], list[float], float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same initial weights and order of the data: the losses of the first 20 batches and the results at the end are equal."""
    monkeypatch.chdir(tmp_path)
    before, after, gap = results(run)
    if "LOSSES" in os.environ:
        (Path(os.environ["LOSSES"]) / f"{run.__name__}.json").write_text(json.dumps([before, after, gap]))
    assert len(before) == len(after) >= 20
    assert after[:20] == pytest.approx(before[:20], rel=1e-6, abs=0)
    assert before[19] != before[0]
    assert gap == pytest.approx(0.0, abs=1e-6)
