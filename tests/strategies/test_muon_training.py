"""Training with Muon on two ranks, with everything that surrounds an update."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem import Runner
from stratagem.model import SupervisedModel
from stratagem.strategies import DDPStrategy, FSDPStrategy
from stratagem.tensors.dtensor import full_tensor
from tests.support.ranks import Ranks

# More samples per rank than features, so that the gradients have full rank.
SAMPLES, WIDTH, STEPS = 48, 12, 6
MUON: dict[str, Any] = {"type": "Muon", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
GROUPS: dict[str, Any] = {"paramwise_cfg": {"custom_keys": {"network.0": {"lr_mult": 0.5, "decay_mult": 0.0}}}}


def network() -> SupervisedModel:
    """Return a model with three matrices, one of which no number of ranks divides evenly."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, 20, bias=False), nn.Tanh(), nn.Linear(20, 7, bias=False), nn.Linear(7, 4, bias=False)]
    return SupervisedModel(nn.Sequential(*layers), nn.MSELoss())


def batch(step: int, rank: int, *, bad: bool = False) -> tuple[Tensor, Tensor]:
    """Return the samples of a rank."""
    generator = torch.Generator().manual_seed(2 * step + rank)
    x, y = torch.randn(SAMPLES, WIDTH, generator=generator), torch.randn(SAMPLES, 4, generator=generator)
    return x * (math.nan if bad else 1.0), y


def trained(
    folder: str, kind: str, optim: dict[str, Any], bad: tuple[int, ...] = (), **options: Any
) -> dict[str, Tensor]:
    """Train with a schedule; return the parameters, and the momenta by the name of the parameter and ``.momentum``."""
    made: Any = FSDPStrategy if kind == "FSDP" else DDPStrategy
    strategy = made(work_dir=folder, log_kwargs={"log_level": "ERROR"}, env_kwargs={"launcher": "pytorch"}, **options)
    try:
        model, wrapper, schedules = strategy.prepare(
            network(),
            optim_wrapper={"optimizer": MUON, **optim},
            param_scheduler={"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 4},
            dispatch_kwargs={"max_iters": STEPS, "max_epochs": 1, "epoch_length": STEPS},
        )
        for step in range(STEPS):
            model.train_step(batch(step, strategy.rank, bad=step in bad), wrapper)
            for each in schedules:
                each.step()
        named = dict(strategy.unwrap_model().named_parameters())
        state = wrapper.optimizer.state_dict()["state"]
        keys = [next(key for key, each in named.items() if each is parameter) for parameter in wrapper._parameters()]
        momenta = {f"{keys[index]}.momentum": full_tensor(each["momentum_buffer"]) for index, each in state.items()}
        return {**{key: full_tensor(each.detach()).clone() for key, each in named.items()}, **momenta}
    finally:
        strategy.close()


CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "groups": (GROUPS, ()),
    "accumulation": ({"accumulative_counts": 2}, ()),
    "skipped update": ({"nonfinite": "skip"}, (2,)),
    "clipping": ({"clip_grad": {"max_norm": 0.05}}, ()),
}


def compared(folder: str) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Return the results of DDP and both forms under FSDP."""
    return {
        case: {
            "DDP": trained(folder, "DDP", optim, bad),
            "owned": trained(folder, "FSDP", optim, bad),
            "gathered": trained(folder, "FSDP", optim, bad, matrix_updates="gathered"),
        }
        for case, (optim, bad) in CASES.items()
    }


@pytest.mark.slow
def test_ddp_and_fsdp_train_with_muon_to_the_same_bits(ranks: Ranks, tmp_path: Path) -> None:
    """Parameters and momenta are bitwise equal, with groups, schedules, accumulation and a skipped update.

    With clipping, the norms of DDP and FSDP are sums in a different order, so only both forms of FSDP are bitwise equal.
    """
    for found in ranks.run(compared, str(tmp_path)):
        for case, results in found.items():
            ddp, owned, gathered = results["DDP"], results["owned"], results["gathered"]
            assert ddp.keys() == owned.keys() == gathered.keys()
            assert len(ddp) == 6
            for name, value in ddp.items():
                assert value.isfinite().all(), (case, name)
                assert torch.equal(owned[name], gathered[name]), (case, name)
                if case == "clipping":
                    torch.testing.assert_close(owned[name], value, rtol=0, atol=2e-3, msg=f"{case}: {name}")
                else:
                    assert torch.equal(owned[name], value), (case, name)


def zero(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters of DDP with and without a divided optimizer state."""
    # Importing torch.distributed.optim compiles functions with TorchScript, which causes a warning.
    warnings.simplefilter("ignore", DeprecationWarning)
    options = {key: value for key, value in MUON.items() if key != "type"}
    divided = {"type": "ZeroRedundancyOptimizer", "optimizer_type": "Muon", **options}
    return trained(folder, "DDP", {}), trained(folder, "DDP", {"optimizer": divided})


@pytest.mark.slow
def test_muon_in_a_zero_redundancy_optimizer_has_the_bits_of_muon(ranks: Ranks, tmp_path: Path) -> None:
    """ZeRO divides the state by whole parameters, so each rank orthogonalizes whole matrices."""
    for plain, divided in ranks.run(zero, str(tmp_path)):
        assert all(torch.equal(divided[name], value) for name, value in plain.items())


def mixed_precision(folder: str) -> list[dict[str, Tensor]]:
    """Return the parameters of both forms with bfloat16 computations."""
    return [
        trained(folder, "FSDP", {}, matrix_updates=form, mixed_precision="bfloat16") for form in ("owned", "gathered")
    ]


@pytest.mark.slow
def test_both_forms_have_the_same_bits_with_mixed_precision(ranks: Ranks, tmp_path: Path) -> None:
    """With bfloat16 computations, the parameters stay in float32, and both forms of Muon train to the same bits."""
    for owned, gathered in ranks.run(mixed_precision, str(tmp_path)):
        for name, value in owned.items():
            assert value.dtype is torch.float32
            assert torch.equal(gathered[name], value)


class Samples(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """As many samples as two ranks need for six iterations."""

    def __len__(self) -> int:
        return 2 * 16 * STEPS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(WIDTH, generator=generator), torch.randn(4, generator=generator)


def run(folder: Path, optimizer: dict[str, Any], **changes: Any) -> dict[str, Tensor]:
    """Run a configuration under FSDP; return the parameters."""
    runner = Runner.from_cfg(
        {
            "model": network(),
            "work_dir": str(folder),
            "strategy": {"type": "FSDPStrategy"},
            "launcher": "pytorch",
            "log_level": "ERROR",
            "randomness": {"seed": 0},
            "optim_wrapper": {"optimizer": optimizer, "clip_grad": {"max_norm": 1.0}},
            "train_dataloader": {"batch_size": 16, "num_workers": 0, "dataset": Samples()},
            "train_cfg": {"by_epoch": False, "max_iters": STEPS},
            "default_hooks": {"checkpoint": {"by_epoch": False, "interval": STEPS // 2}},
            **changes,
        }
    )
    runner.train()
    named = runner.strategy.unwrap_model().named_parameters()
    return {name: full_tensor(each.detach()).clone() for name, each in named}


def runs(folder: str) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Return the parameters of uninterrupted runs, and of runs that resume in the middle."""
    found = []
    for optimizer in (MUON, {"type": "Adafactor", "lr": 0.05}):
        path = Path(folder) / str(optimizer["type"])
        whole = run(path / "whole", optimizer)
        saved = str(path / "whole" / f"iter_{STEPS // 2}")
        found.append((whole, run(path / "resumed", optimizer, resume=True, load_from=saved)))
    return found


@pytest.mark.slow
def test_runs_with_whole_updates_resume_exactly_under_fsdp(ranks: Ranks, tmp_path: Path) -> None:
    """A configuration with Muon or Adafactor trains under FSDP, and a resumed run ends with the same bits."""
    for results in ranks.run(runs, str(tmp_path)):
        for whole, resumed in results:
            assert any(
                not torch.equal(value, dict(network().named_parameters())[name]) for name, value in whole.items()
            )
            assert all(torch.equal(resumed[name], value) for name, value in whole.items())
