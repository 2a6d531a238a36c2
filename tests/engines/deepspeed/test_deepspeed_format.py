"""Checkpoints in DeepSpeed's format are saved on request and read by every strategy and ``ckpt convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stratagem.checkpoint.convert.convert import convert_checkpoint
from tests.engines.deepspeed.engine_runs import differences, go, placed, state_in
from tests.support.ranks import Ranks

pytestmark = pytest.mark.deepspeed

NATIVE = {"checkpoint_format": "deepspeed"}


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 kept", "ZeRO-2 offload"])
def test_the_deepspeed_format_can_be_converted(two: Ranks, folder: Path, name: str) -> None:
    """The result has the same parameters and optimizer states, bit for bit, as a portable checkpoint of the same state."""
    two.run(go, placed(name), folder / "a", stop=6, save=folder / "portable")
    two.run(
        go, placed(name, **NATIVE), folder / "b", start=6, stop=6, resume=folder / "portable", save=folder / "native"
    )
    convert_checkpoint(folder / "native", folder / "converted")
    assert differences(_numbers(folder / "portable"), _numbers(folder / "converted")) == []


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-2", "ZeRO-3"])
def test_the_deepspeed_format_can_be_resumed_on_other_ranks(
    two: Ranks, four: Ranks, single: dict[str, Any], folder: Path, name: str
) -> None:
    """The run can be resumed with another number of ranks, which DeepSpeed does not support, and with other strategies."""
    two.run(go, placed(name, **NATIVE), folder / "a", stop=6, save=folder / "iter_6")
    seen = four.run(go, placed("ZeRO-3", **NATIVE), folder / "b", start=6, resume=folder / "iter_6")[0]
    alone = go(placed("single"), folder / "c", start=6, resume=folder / "iter_6")
    for losses in (seen["losses"], alone["losses"]):
        assert losses == pytest.approx(single["losses"][6:], rel=5e-5)


@pytest.mark.parametrize(("name", "kind"), [("ZeRO-0", "bf16"), ("ZeRO-2", "bf16"), ("ZeRO-3", "fp16")])
def test_the_deepspeed_format_contains_master_weights_and_loss_scale(
    two: Ranks, folder: Path, name: str, kind: str
) -> None:
    """A 16-bit model resumes from its float32 master weights, as it does from the portable format."""
    half = placed(name, **{kind: True})
    two.run(go, half, folder / "a", stop=6, save=folder / "portable")
    two.run(go, {**half, **NATIVE}, folder / "b", stop=6, save=folder / "native")
    one, other = (
        two.run(go, half, folder / each, start=6, resume=folder / each)[0]["losses"] for each in ("portable", "native")
    )
    assert one == other


def _numbers(checkpoint: Path) -> dict[str, Any]:
    state = state_in(checkpoint)
    # Frozen parameters are at the end of DeepSpeed's only group but not of the portable one, and options are in another order.
    return {name: value for name, value in state.items() if "/params/" not in name}
