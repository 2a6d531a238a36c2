"""Runs resume whether the whole model, a part of it or nothing is compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem import Runner
from stratagem.checkpoint import CheckpointLoader, load_checkpoint, save_checkpoint
from tests.support.ranks import Ranks
from tests.train.toys import QUIET_HOOKS, Toy, settings

pytestmark = pytest.mark.slow

MakeRunner = Callable[..., Runner]
KINDS = ["plain", "whole", "part"]


def compiled(module: nn.Module) -> nn.Module:
    """Return a module compiled with a backend that takes no time."""
    wrapper: nn.Module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    return wrapper


class PartlyCompiled(Toy):
    """The layers of the toy are compiled as a whole, and one of them again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = compiled(self.layers[0])
        self.layers = compiled(self.layers)


class Holder(Toy):
    """A model with an attribute that has the same name as the attribute of a compiled module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self._orig_mod = Toy().layers

    def forward(self, inputs: Tensor, classes: Tensor, numbers: Tensor, mode: str = "tensor") -> Any:
        return {"loss": nn.functional.cross_entropy(self._orig_mod(inputs), classes)}


def run_of(kind: str, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run with Adam, averaged weights and gradient accumulation."""
    return {
        "model": {"type": {"part": PartlyCompiled, "holder": Holder}.get(kind, Toy)},
        "compile": {"backend": "eager"} if kind == "whole" else False,
        "train_cfg": {"by_epoch": False, "max_iters": 10},
        "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 0.1}, "accumulative_counts": 2},
        "custom_hooks": [{"type": "EMAHook", "momentum": 0.1}],
        "default_hooks": {**QUIET_HOOKS, "checkpoint": {"by_epoch": False, "interval": 5}},
        **changes,
    }


def trained(make: MakeRunner, kind: str, work_dir: Path, **changes: Any) -> dict[str, Any]:
    """Train 10 iterations with a checkpoint in the middle of a window at 5, and return the last checkpoint."""
    runner = make(**run_of(kind, work_dir=work_dir, **changes))
    runner.train()
    runner.close()
    return CheckpointLoader.load_checkpoint(work_dir / "iter_10")


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare the weights, the optimizer state and the averages of two checkpoints exactly."""
    assert list(one["state_dict"]) == list(other["state_dict"])
    torch.testing.assert_close(one["state_dict"], other["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(one["optimizer"]["state"], other["optimizer"]["state"], rtol=0, atol=0)
    torch.testing.assert_close(one["average"]["averages"], other["average"]["averages"], rtol=0, atol=0)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(KINDS, KINDS)))
def test_a_run_resumes_with_other_parts_compiled(
    make_runner: MakeRunner, tmp_path: Path, before: str, after: str
) -> None:
    """A resumed run with compiled parts is bit-identical to a plain run: weights, optimizer, averages and open window."""
    expected = trained(make_runner, "plain", tmp_path / "plain")
    trained(make_runner, before, tmp_path / "before")
    resumed = trained(make_runner, after, tmp_path / "after", resume=str(tmp_path / "before" / "iter_5"))
    assert_equal(resumed, expected)


def test_a_checkpoint_with_names_of_a_compiled_part_is_resumed(make_runner: MakeRunner, tmp_path: Path) -> None:
    """Earlier versions saved ``layers._orig_mod.3.weight``; such checkpoints resume in a plain and in a compiled model."""
    expected = trained(make_runner, "plain", tmp_path / "plain")
    saved = CheckpointLoader.load_checkpoint(tmp_path / "plain" / "iter_5")

    def old(names: Any) -> Any:
        return [name.replace("layers.", "layers._orig_mod.") for name in names]

    for entries in (
        saved["state_dict"],
        saved["optimizer"]["state"],
        saved["average"]["averages"],
        saved["window"]["gradients"],
    ):
        for name in list(entries):
            entries[old([name])[0]] = entries.pop(name)
    (group,) = saved["optimizer"]["param_groups"]
    group["params"] = old(group["params"])
    own = saved["window"]["ranks"]["0"]
    own["gradients"] = old(own["gradients"])
    for kind in ("plain", "part"):
        save_checkpoint(saved, tmp_path / kind / "old")
        resumed = trained(make_runner, kind, tmp_path / f"{kind}_run", resume=str(tmp_path / kind / "old"))
        assert_equal(resumed, expected)


def test_a_model_with_an_attribute_orig_mod_resumes(make_runner: MakeRunner, tmp_path: Path) -> None:
    """An attribute of the model with this name is part of the parameter names, as in torch."""
    expected = trained(make_runner, "holder", tmp_path / "whole")
    assert "_orig_mod.0.weight" in expected["state_dict"]
    resumed = trained(make_runner, "holder", tmp_path / "resumed", resume=str(tmp_path / "whole" / "iter_5"))
    assert_equal(resumed, expected)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_load_into_a_partly_compiled_model(tmp_path: Path, prefix: str) -> None:
    """``load_from`` finds all weights of a plain, wrapped or compiled model for a model whose parts are compiled."""
    source, target = Toy(), PartlyCompiled()
    torch.save({prefix + name: value for name, value in source.state_dict().items()}, tmp_path / "w.pth")
    load_checkpoint(target, tmp_path / "w.pth", strict=True)
    for one, other in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(one, other)


def train_on_ranks(folder: str, strategy: str, before: str, after: str) -> tuple[list[str], list[float]]:
    """Train, resume from the fifth iteration with other parts compiled, and return the names and weights at the end."""
    for kind, name, resume in ((before, "before", False), (after, "after", str(Path(folder) / "before" / "iter_5"))):
        placement = {"type": "DDPStrategy" if strategy == "ddp" else "FSDPStrategy"}
        changes = {"work_dir": Path(folder) / name, "resume": resume, "strategy": placement, "launcher": "pytorch"}
        # FSDP does not save the gradients of an incomplete window.
        changes["optim_wrapper"] = {"optimizer": {"type": "AdamW", "lr": 0.1}}
        runner = Runner(**settings(**run_of(kind, **changes)))
        runner.train()
        runner.close()
    saved = CheckpointLoader.load_checkpoint(Path(folder) / "after" / "iter_10")
    return list(saved["state_dict"]), torch.cat([value.flatten() for value in saved["state_dict"].values()]).tolist()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_resume_with_a_compiled_part(ranks: Ranks, tmp_path: Path, strategy: str) -> None:
    """Under DDP and FSDP, a plain run can be resumed with a compiled part, and vice versa."""
    plain = ranks.run(train_on_ranks, str(tmp_path / "plain"), strategy, "plain", "plain")
    for before, after in (("plain", "part"), ("part", "plain")):
        assert ranks.run(train_on_ranks, str(tmp_path / f"{before}_{after}"), strategy, before, after) == plain
