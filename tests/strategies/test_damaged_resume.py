"""A damaged checkpoint leaves the model, the optimizer and the schedulers unchanged, with every strategy."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.errors import CheckpointDamagedError
from stratagem.strategies import BaseStrategy, FSDPStrategy
from tests.support.ranks import Ranks
from tests.support.small_runs import Mlp, batch, make, train

OPTIM = {"optimizer": {"type": "AdamW", "lr": 0.05}}
SCHEDULE = [{"type": "CosineAnnealingLR", "by_epoch": False, "end": 12}]


def flip(file: Path, offset: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 4
    file.write_bytes(data)


def tensor_bytes(file: Path) -> int:
    """Return the number of bytes of all tensors in a safetensors file."""
    data = file.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "first byte of the first file": lambda path: flip(
        path / "model.safetensors", -tensor_bytes(path / "model.safetensors")
    ),
    "last byte of the last file": lambda path: flip(path / "optimizer.safetensors", -1),
    "middle of the last file": lambda path: flip(
        path / "optimizer.safetensors", -tensor_bytes(path / "optimizer.safetensors") // 2
    ),
    "last file truncated": lambda path: (path / "optimizer.safetensors").write_bytes(
        (path / "optimizer.safetensors").read_bytes()[:-4]
    ),
    "state.json": lambda path: flip(path / "state.json", 10),
}


def prepared(kind: str, folder: str) -> BaseStrategy:
    """Return a strategy that trains an Mlp with AdamW and a schedule."""
    if kind == "fsdp":
        strategy: BaseStrategy = FSDPStrategy(work_dir=folder, env_kwargs={"randomness": {"seed": 0}})
    else:
        strategy = make(kind, folder)
    strategy.prepare(Mlp(), optim_wrapper=OPTIM, param_scheduler=SCHEDULE)
    return strategy


def facts(strategy: BaseStrategy) -> dict[str, Any]:
    """Return copies of the whole local state, and the addresses of the parameters."""
    local = [getattr(each, "_local_tensor", each).detach() for each in strategy.model.parameters()]
    return {
        "weights": [each.clone() for each in local],
        "optimizer": copy.deepcopy(strategy.optim_wrapper.state_dict()),
        "schedulers": copy.deepcopy(strategy.scheduler_state_dict()),
        "random": torch.get_rng_state(),
        "addresses": [each.data_ptr() for each in local],
    }


def equal(one: Any, other: Any) -> bool:
    """Return whether two trees are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        one, other = getattr(one, "_local_tensor", one), getattr(other, "_local_tensor", other)
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def refuses_damage(kind: str, folder: str, *, trained: bool) -> dict[str, Any]:
    """Resume from damaged copies of a checkpoint, then from the checkpoint; return what changed."""
    strategy = prepared(kind, folder)
    saved = Path(folder) / "saved"
    train(strategy, [batch()] * 2)
    strategy.save_checkpoint(saved)
    expected = facts(strategy)
    strategy.close()
    strategy = prepared(kind, folder)
    if trained:
        train(strategy, [(batch()[0] * 2, batch()[1])])
    before = facts(strategy)
    unchanged = {}
    for name, damage in DAMAGE.items():
        copied = Path(folder) / f"damaged {name}"
        if strategy.rank == 0:
            damage(Path(shutil.copytree(saved, copied)))
        if strategy.distributed:
            torch.distributed.barrier()
        try:
            strategy.resume(copied)
            unchanged[name] = False
        except CheckpointDamagedError:
            unchanged[name] = equal(facts(strategy), before)
    strategy.resume(saved)
    after = facts(strategy)
    strategy.close()
    return {
        "unchanged": unchanged,
        "in place": after["addresses"] == before["addresses"],
        "restored": [key for key in ("weights", "optimizer", "schedulers") if equal(after[key], expected[key])],
    }


RESTORED = {
    "unchanged": dict.fromkeys(DAMAGE, True),
    "in place": True,
    "restored": ["weights", "optimizer", "schedulers"],
}


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_a_damaged_checkpoint_changes_nothing(tmp_path: Path, trained: bool) -> None:
    """Damage in the first, middle or last bytes leaves a strategy unchanged; then a sound checkpoint is restored in place."""
    assert refuses_damage("single", str(tmp_path), trained=trained) == RESTORED


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_damaged_checkpoint_changes_nothing_on_two_ranks(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """Both ranks of DDP and FSDP raise an error for damage anywhere, keep their state, and then restore a sound checkpoint."""
    assert ranks.run(refuses_damage, kind, str(tmp_path), trained=False) == [RESTORED, RESTORED]


def test_the_optimizer_keeps_the_memory_that_was_verified(tmp_path: Path) -> None:
    """A process on the CPU that resumes reads the moments once: the optimizer keeps these tensors instead of copies."""
    strategy = prepared("single", str(tmp_path))
    train(strategy, [batch()])
    strategy.save_checkpoint(tmp_path / "saved")
    strategy.close()
    strategy = prepared("single", str(tmp_path))
    read: dict[str, int] = {}

    def note(checkpoint: dict[str, Any]) -> None:
        state = checkpoint["optimizer"]["state"]
        read.update({name: slots["exp_avg"].data_ptr() for name, slots in state.items()})

    strategy.resume(tmp_path / "saved", callback=note)
    kept = strategy.optim_wrapper.optimizer.state
    names = {each: name for name, each in strategy.model.named_parameters()}
    assert {names[each]: slots["exp_avg"].data_ptr() for each, slots in kept.items()} == read
    strategy.close()
