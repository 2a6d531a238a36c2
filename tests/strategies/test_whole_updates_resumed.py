"""Optimizer states of whole parameters are saved by name, and any number of ranks and any placement resumes from them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratagem.checkpoint import BackgroundSaver, CheckpointLoader
from stratagem.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from stratagem.tensors.dtensor import full_tensor
from tests.optim.test_whole_updates import KINDS as WHOLE
from tests.optim.test_whole_updates import are_equal
from tests.support.given_gradients import LAYOUTS, network, set_gradients
from tests.support.ranks import Ranks

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Muon": (torch.optim.Muon, {}),
    **{name: WHOLE[name] for name in ("Adafactor", "Whitening", "GlobalNorm")},
}
BEFORE, AFTER = 3, 2


def run(
    folder: Path, placement: str, name: str, steps: range, *, start: str = "", end: str = "", background: bool = False
) -> dict[str, Tensor]:
    """Update with the gradients of some steps; resume from ``start`` before them and save ``end`` after them."""
    kind, options = KINDS[name]
    arguments: dict[str, Any] = {"work_dir": str(folder), "log_kwargs": {"log_level": "ERROR"}}
    if placement == "single":
        strategy: Any = SingleDeviceStrategy(**arguments)
    elif placement == "DDP":
        strategy = DDPStrategy(**arguments, env_kwargs={"launcher": "pytorch"})
    else:
        layout, _, form = placement.partition(", ")
        own = {**LAYOUTS[layout][1], "matrix_updates": form or "owned"}
        strategy = FSDPStrategy(**arguments, env_kwargs={"launcher": "pytorch"}, **own)
    try:
        _, wrapper = strategy.prepare(network(), optim_wrapper={"optimizer": {"type": kind, "lr": 0.05, **options}})
        if start:
            strategy.resume(folder / start)
        for step in steps:
            set_gradients(strategy.unwrap_model(), step)
            wrapper.step()
        if start and name == "Whitening":
            # The state of a rank is a part of that of the strategy, which can be loaded again.
            strategy.load_optim_state_dict(strategy.optim_state_dict())
        if end:
            save(strategy, folder / end, background=background)
        named = strategy.unwrap_model().named_parameters()
        return {key: full_tensor(each.detach()).clone() for key, each in named}
    finally:
        strategy.close()


def save(strategy: Any, path: Path, *, background: bool) -> None:
    """Save a checkpoint, and wait until it has been written."""
    if not background:
        strategy.save_checkpoint(path)
        return
    saver = BackgroundSaver(logging.getLogger(__name__))
    try:
        strategy.save_checkpoint(path, write=saver.save)
        saver.settle()
    finally:
        saver.close()


def save_all(folder: Path, placement: str) -> None:
    """Save a checkpoint of each optimizer after some steps, of Whitening in the background."""
    for name in KINDS:
        run(folder, placement, name, range(BEFORE), end=f"{name}_{placement}", background=name == "Whitening")


def resume_all(folder: Path, saved: str, placements: list[str]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Continue each checkpoint with each placement."""
    return {
        (name, placement): run(
            folder,
            placement,
            name,
            range(BEFORE, BEFORE + AFTER),
            start=f"{name}_{saved}",
            end=f"{name}_{placement}_end",
        )
        for name in KINDS
        for placement in placements
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all checkpoints."""
    return tmp_path_factory.mktemp("whole_updates")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The parameters of each optimizer after all steps of a single process, which saves checkpoints before and after."""
    save_all(folder, "single")
    for name in KINDS:
        run(folder, "single", name, range(BEFORE + AFTER), end=f"{name}_end")
    return {name: run(folder, "single", name, range(BEFORE + AFTER)) for name in KINDS}


@pytest.fixture(scope="module")
def saved(ranks: Ranks, folder: Path) -> str:
    """The placement whose checkpoints after the first steps are in the folder."""
    ranks.run(save_all, folder, "FSDP x2")
    return "FSDP x2"


def require(found: dict[tuple[str, str], dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    """Require that all parameters are bitwise equal to those of a single process."""
    for (name, placement), weights in found.items():
        for key, each in expected[name].items():
            assert torch.equal(weights[key], each), (name, placement, key)


@pytest.mark.slow
def test_two_ranks_resume_whole_states_with_any_placement(
    ranks: Ranks, folder: Path, saved: str, expected: dict[str, dict[str, Tensor]]
) -> None:
    """Checkpoints of FSDP on two ranks, also those saved in the background, continue bit-equal under FSDP, TP and DDP."""
    placements = ["FSDP x2", "FSDP x2, gathered", "TP x2", "DDP"]
    for found in ranks.run(resume_all, folder, saved, placements):
        require(found, expected)


@pytest.mark.slow
def test_a_single_process_and_four_ranks_resume_whole_states(
    four: Ranks, folder: Path, saved: str, expected: dict[str, dict[str, Tensor]]
) -> None:
    """Checkpoints of FSDP on two ranks continue bit-equal in a single process, on four ranks and under HSDP."""
    require(resume_all(folder, saved, ["single"]), expected)
    for found in four.run(resume_all, folder, saved, ["FSDP x4", "HSDP 2x2"]):
        require(found, expected)


@pytest.mark.slow
def test_shards_resume_states_of_a_single_process(
    ranks: Ranks, folder: Path, expected: dict[str, dict[str, Tensor]]
) -> None:
    """Checkpoints of a single process continue bit-equal under FSDP on two ranks."""
    for found in ranks.run(resume_all, folder, "single", ["FSDP x2", "FSDP x2, gathered"]):
        require(found, expected)


@pytest.mark.slow
def test_checkpoints_of_shards_hold_the_optimizer_state_of_a_single_process(
    folder: Path, saved: str, expected: dict[str, dict[str, Tensor]]
) -> None:
    """The optimizer states under FSDP have the same names, keys and values as those of a single process."""
    for name in KINDS:
        states = [CheckpointLoader.load_checkpoint(folder / f"{name}_{own}")["optimizer"] for own in ("single", saved)]
        assert are_equal(states[0]["state"], states[1]["state"]), name
        groups = [
            {key: value for key, value in state["param_groups"][0].items() if key not in ("foreach", "fused")}
            for state in states
        ]
        assert are_equal(*groups), name
