"""`stratagem plan` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stratagem.cli.plan.command import _resized


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--device", "h100"),
            "Did you mean h100-80g or h100-nvl or h100-pcie? For any other device, specify its memory",
        ),
        (("--memory", "80G"), "--memory '80G' is not an amount of memory. Write a positive number with a unit: 80GiB"),
        (("--memory", "80GiB", "--device", "l4"), "--device l4 and --memory 80.0 GiB conflict"),
        (("--world", "8,x"), "--world '8,x' is not a list of numbers of ranks. Example: --world 8,64,512."),
        (("--world", "12"), "12 ranks (--world) cannot be distributed equally across nodes of 8 (--gpus-per-node)."),
        (("--all", "--strategy", "ddp"), "--all and --strategy ddp conflict. Omit one of them."),
        (
            ("--mtbf", "50000"),
            "--mtbf '50000' is not a duration. Write a positive number with a unit: 90s, 15min, 50000h or 30d.",
        ),
        (("--storage", "2GB"), "--storage '2GB' is not a bandwidth."),
        (
            ("--device", "l4", "--across-link", "nvlnk4"),
            "The link 'nvlnk4' is not in the table. Did you mean 'nvlink4'",
        ),
        (("--links", "missing.json"), "missing.json cannot be read"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    stratagem: Callable[..., Any], config: str, words: tuple[str, ...], message: str
) -> None:
    """Each message has the value, and what to write instead."""
    outcome = stratagem("plan", config, *words)
    assert outcome.status == 2
    assert message in " ".join(outcome.err.split())


def test_half_of_a_described_batch() -> None:
    """Only the first dimension of tensors changes, and only if it is the number of samples."""
    assert (
        _resized("tokens=int64[8,8],mask=bool[8],scale=float32[80]", 8, 4)
        == "tokens=int64[4,8],mask=bool[4],scale=float32[80]"
    )
    assert _resized("tokens=int64[8,8]", 8, None) == "tokens=int64[8,8]"
    assert _resized(None, 8, 4) is None


@pytest.mark.slow
def test_a_plan_of_a_configuration(stratagem: Callable[..., Any], config: str, tmp_path: Path) -> None:
    """Two strategies on two ranks: sizes in the table, JSON, and both files."""
    words = ("plan", config, "--world", "2", "--gpus-per-node", "2", "--strategy", "ddp,fsdp", "--device", "l4")
    outcome = stratagem(*words, "--json", "--html", "plan.html", "--out", "plan.png")
    assert outcome.status == 0, outcome.err
    (section,) = json.loads(outcome.out)["sections"]
    ddp, fsdp = section["strategies"]
    assert [ddp["strategy"], fsdp["strategy"]] == ["DDPStrategy", "FSDPStrategy"]
    # Each of the two ranks has half of the optimizer state, except for the step counts of the parameters.
    whole, half = ddp["memory"]["optimizer_state"], fsdp["memory"]["optimizer_state"]
    assert 0.5 * whole <= half < 0.6 * whole
    assert ddp["fits"]
    assert [each["failure"] for each in (ddp, fsdp)] == [None, None]
    assert 0 < ddp["time"]["shortest"] <= ddp["time"]["longest"]
    assert (tmp_path / "plan.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (tmp_path / "plan.png").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.html", "plan.png"]
