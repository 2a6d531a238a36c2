"""DeepSpeed checkpoints in the portable format can be resumed by any strategy, and vice versa."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.deepspeed.engine_runs import differences, go, placed, state_in
from tests.support.ranks import Ranks

pytestmark = pytest.mark.deepspeed

Run = Callable[..., dict[str, Any]]
# The strategies that save and resume: each engine and number of ranks on both sides.
MOVES = [
    ("single", "ZeRO-0 x2"),
    ("single", "ZeRO-2 x2"),
    ("single", "ZeRO-3 x4"),
    ("ZeRO-0 x2", "single"),
    ("ZeRO-1 x2", "ZeRO-3 x4"),
    ("ZeRO-1 x4", "FSDP x2"),
    ("ZeRO-2 x2", "ZeRO-1 x4"),
    ("ZeRO-2 offload x2", "ZeRO-3 x2"),
    ("ZeRO-3 x2", "single"),
    ("ZeRO-3 x2", "FSDP x4"),
    ("ZeRO-3 x4", "ZeRO-0 x2"),
    ("ZeRO-3 kept x2", "DDP x2"),
    ("ZeRO-3 offload x2", "ZeRO-2 offload x2"),
    ("DDP x2", "ZeRO-3 kept x2"),
    ("FSDP x4", "ZeRO-3 offload x2"),
]


@pytest.fixture
def run(two: Ranks, four: Ranks) -> Run:
    """Return a function that trains with the strategy and ranks of a name such as "ZeRO-3 x4"."""

    def run(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kind, _, size = name.rpartition(" x")
        if not kind:
            return go(placed(name), *args, **kwargs)
        seen: dict[str, Any] = {"2": two, "4": four}[size].run(go, placed(kind), *args, **kwargs)[0]
        return seen

    return run


@pytest.mark.parametrize(("source", "target"), MOVES)
def test_checkpoints_can_be_resumed_by_other_strategies(
    run: Run, single: dict[str, Any], folder: Path, source: str, target: str
) -> None:
    """Parameters and optimizer states are bit-identical, and the losses are those of the uninterrupted run."""
    before = run(source, folder / "a", stop=6, save=folder / "saved")
    after = run(target, folder / "b", start=6, resume=folder / "saved", found=folder / "found")
    assert differences(state_in(folder / "saved"), state_in(folder / "found")) == []
    assert before["losses"] + after["losses"] == pytest.approx(single["losses"], rel=5e-5)
    assert before["rates"] + after["rates"] == single["rates"]


def test_a_single_file_contains_the_same_state(run: Run, single: dict[str, Any], folder: Path) -> None:
    """A name with the suffix .pth saves one file with unsharded tensors."""
    run("ZeRO-3 x2", folder / "a", stop=6, save=folder / "saved.pth")
    after = run("single", folder / "b", start=6, resume=folder / "saved.pth")
    assert after["losses"] == pytest.approx(single["losses"][6:], rel=5e-5)


def test_a_checkpoint_from_before_the_first_update_can_be_resumed(
    run: Run, single: dict[str, Any], folder: Path
) -> None:
    """Before the first step there are no optimizer states, and none are required."""
    run("ZeRO-2 x2", folder / "a", stop=0, save=folder / "saved")
    after = run("ZeRO-3 x2", folder / "b", resume=folder / "saved")
    assert after["losses"] == pytest.approx(single["losses"], rel=5e-5)


def test_load_from_loads_only_weights(run: Run, single: dict[str, Any], folder: Path) -> None:
    """load_from starts a new run with the weights of another one."""
    expected = run("single", folder / "a", load=single["at"])
    seen = run("ZeRO-3 x2", folder / "b", load=single["at"])
    assert seen["losses"] == pytest.approx(expected["losses"], rel=5e-5)
