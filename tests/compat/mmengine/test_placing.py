"""The strategies of a runner of the MMEngine layer, and the evaluation of sharded models."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler

from stratagem.compat.mmengine.checks import NotSupportedError
from stratagem.compat.mmengine.evaluator import BaseMetric
from stratagem.compat.mmengine.hooks import Hook
from stratagem.compat.mmengine.model import BaseModel
from stratagem.compat.mmengine.runner import FlexibleRunner, Runner
from stratagem.dist import get_rank
from stratagem.errors import ConfigValueError
from stratagem.strategies import SingleDeviceStrategy
from tests.support.ranks import Ranks


class Model(BaseModel):
    """Predicts the input and counts the forward passes."""

    def __init__(self):
        super().__init__()
        self.linear, self.passes = nn.Linear(1, 1), 0

    def forward(self, inputs, data_samples=None, mode="tensor"):
        self.passes += 1
        output = self.linear(torch.stack(inputs))
        return {"loss": output.square().mean()} if mode == "loss" else list(output)


class Numbers(Dataset):
    """Ten samples, which are their indices."""

    @property
    def metainfo(self):
        return {}

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"inputs": torch.tensor([float(index)]), "data_samples": index}


class Halves(Sampler):
    """Yields the first seven samples on rank 0 and the others on rank 1; it has no attributes with the ranks."""

    def __init__(self, dataset, seed):
        self.indices = list(range(7)) if get_rank() == 0 else [7, 8, 9]

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


class Seen(BaseMetric):
    """The samples that were evaluated."""

    def process(self, data_batch, data_samples):
        self.results += data_batch["data_samples"]

    def compute_metrics(self, results):
        return {"seen": sorted(results)}


def arguments(folder: Path, **changes):
    loader = {"dataset": Numbers(), "batch_size": 2, "num_workers": 0}
    return {
        "model": Model(),
        "work_dir": str(folder),
        "train_dataloader": {**loader, "sampler": {"type": "DefaultSampler"}},
        "train_cfg": {"by_epoch": True, "max_epochs": 1},
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.01}},
        "val_dataloader": {**loader, "sampler": {"type": Halves}},
        "val_cfg": {},
        "val_evaluator": [Seen(prefix="x")],
        "randomness": {"seed": 3},
        "experiment_name": folder.name,
        **changes,
    }


def validate(folder: Path, strategy: str) -> tuple[list[int], int]:
    """Return the samples that a validation on two ranks has evaluated, and the number of forward passes of this rank."""
    runner = FlexibleRunner(**arguments(folder, strategy={"type": strategy}, launcher="pytorch"))
    seen = runner.val()["x/seen"]
    model = runner.model
    return seen, getattr(model, "module", model).passes


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "passes"), [("FSDPStrategy", [4, 4]), ("DDPStrategy", [4, 2])])
def test_ranks_with_different_numbers_of_batches_evaluate_each_sample_once(
    ranks: Ranks, tmp_path: Path, strategy: str, passes: list[int]
) -> None:
    """Each rank evaluates what its sampler yields. If the model is sharded, the shorter rank runs passes without results."""
    results = ranks.run(validate, tmp_path, strategy)
    assert [seen for seen, _ in results] == [list(range(10))] * 2
    assert [number for _, number in results] == passes


def train_with_ema(folder: Path) -> str:
    """Return the error of a training with FSDP and EMAHook."""
    chosen = {"strategy": {"type": "FSDPStrategy"}, "launcher": "pytorch", "custom_hooks": [{"type": "EMAHook"}]}
    with pytest.raises(NotSupportedError) as caught:
        FlexibleRunner(**arguments(folder, **chosen)).train()
    return str(caught.value)


@pytest.mark.slow
def test_ema_hook_refuses_a_sharded_model(ranks: Ranks, tmp_path: Path) -> None:
    """The average is a copy of the whole model, so FSDP is refused on all ranks with what to use instead."""
    for message in ranks.run(train_with_ema, tmp_path):
        assert "Train with DDPStrategy" in message


@pytest.mark.parametrize("strategy", ["DeepSpeedStrategy", "colossalai", {"type": "DeepSpeedStrategy"}])
def test_strategies_that_create_the_optimizer_are_refused(tmp_path: Path, strategy: object) -> None:
    """The engines create the optimizer together with the model, but MMEngine's runner creates one after the other."""
    with pytest.raises(NotSupportedError, match="Use FSDPStrategy"):
        FlexibleRunner(**arguments(tmp_path, strategy=strategy))


@pytest.mark.parametrize("option", [{"model_wrapper_cfg": {"type": "MMDistributedDataParallel"}}, {"sync_bn": "torch"}])
def test_options_of_ddp_are_refused_with_a_strategy(tmp_path: Path, option: dict[str, object]) -> None:
    """A strategy in the configuration would ignore them."""
    with pytest.raises(ConfigValueError, match=f"{next(iter(option))}=.* has no effect"):
        Runner(**arguments(tmp_path, cfg={"strategy": {"type": "SingleDeviceStrategy"}, **option}))


class Interrupted(Hook):
    """Sends SIGTERM to rank 0 in the first batch of a validation, and counts the validations that are complete."""

    validated = 0

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank == 0 and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def after_val_epoch(self, runner, metrics=None):
        self.validated += 1


def interrupt_in_validation(folder: Path, sampler: object) -> tuple[int, list[str]]:
    """Return the number of complete validations, and the checkpoints, of a run that is interrupted in its first validation."""
    hook = Interrupted()
    changes = {"train_cfg": {"by_epoch": True, "max_epochs": 3}, "custom_hooks": [hook], "launcher": "pytorch"}
    data = {"dataset": Numbers(), "batch_size": 2, "num_workers": 0, "sampler": sampler}
    runner = Runner(**arguments(folder, val_dataloader=data, **changes))
    with pytest.raises(SystemExit) as caught:
        runner.train()
    assert caught.value.code == 128 + signal.SIGTERM
    return hook.validated, sorted(path.name for path in folder.glob("*.pth"))


@pytest.mark.slow
def test_a_signal_in_a_validation_with_different_numbers_of_batches_does_not_hang(ranks: Ranks, tmp_path: Path) -> None:
    """All ranks stop after the same iteration; within a validation, only if they have the same number of batches."""
    even = ranks.run(interrupt_in_validation, tmp_path / "even", {"type": "DefaultSampler", "shuffle": False})
    uneven = ranks.run(interrupt_in_validation, tmp_path / "uneven", {"type": Halves})
    # The ranks stop at the first batch or iteration that neither has passed when both know of the signal.
    assert [validated for validated, _ in even] in ([0, 0], [1, 1])
    assert [validated for validated, _ in uneven] == [1, 1]
    for _, names in (*even, *uneven):
        assert names[-1] in ("iter_3.pth", "iter_4.pth", "iter_5.pth", "iter_6.pth", "iter_7.pth")


def unused_parameters(folder: Path) -> dict[str, object]:
    """Return whether DDP looks for unused parameters, for several configurations."""
    option = {"find_unused_parameters": True}
    found = {}
    for name, cfg in {
        "default": option,
        "name": {**option, "strategy": "DDPStrategy"},
        "section": {**option, "strategy": {"type": "DDPStrategy"}},
        "section with the option": {**option, "strategy": {"type": "DDPStrategy", "find_unused_parameters": False}},
        "wrapper with the option": {**option, "model_wrapper_cfg": {"find_unused_parameters": False}},
    }.items():
        runner = Runner(**arguments(folder / name, cfg=cfg, launcher="pytorch"))
        found[name] = runner.model.find_unused_parameters
    with pytest.warns(UserWarning, match="no effect on FSDPStrategy. Omit it"):
        Runner(**arguments(folder / "sharded", cfg={**option, "strategy": "FSDPStrategy"}, launcher="pytorch"))
    return found


@pytest.mark.slow
def test_find_unused_parameters_is_not_ignored_with_a_strategy(ranks: Ranks, tmp_path: Path) -> None:
    """It applies to every configuration of DDP, unless that sets the option itself, and another strategy warns about it."""
    for found in ranks.run(unused_parameters, tmp_path):
        assert found == {
            "default": True,
            "name": True,
            "section": True,
            "section with the option": False,
            "wrapper with the option": False,
        }


def test_a_strategy_that_is_already_built_is_used(tmp_path: Path) -> None:
    """A runner accepts the object, and refuses the settings that only a new strategy would read."""
    strategy = SingleDeviceStrategy(work_dir=tmp_path / "built")
    changes = {"work_dir": str(tmp_path / "built"), "randomness": None}
    runner = FlexibleRunner(**arguments(tmp_path, strategy=strategy, **changes))
    assert runner.val()["x/seen"] == list(range(7))
    for ignored, name in (({"work_dir": str(tmp_path)}, "work_dir"), ({"randomness": {"seed": 3}}, "randomness")):
        with pytest.raises(ConfigValueError, match=f"{name} would be ignored"):
            FlexibleRunner(**arguments(tmp_path, strategy=strategy, **{**changes, **ignored}))


def test_a_misspelled_setting_of_the_process_warns(tmp_path: Path) -> None:
    """MMEngine ignores such keys of env_cfg."""
    with pytest.warns(UserWarning, match="'cudnn_benchmrak' has no effect.*cudnn_benchmark"):
        runner = Runner(**arguments(tmp_path, env_cfg={"cudnn_benchmrak": True}))
    runner.val()  # closes the log files


@pytest.mark.parametrize("initializes", [True, False])
def test_init_weights_for_test_or_val_is_read(tmp_path: Path, initializes: bool) -> None:
    """A flexible runner initializes the weights before a validation, once, unless the option is False."""
    calls = []

    class Initialized(Model):
        def init_weights(self):
            calls.append(1)

    changes = {} if initializes else {"cfg": {"init_weights_for_test_or_val": False}}
    runner = FlexibleRunner(**arguments(tmp_path, model=Initialized(), strategy="SingleDeviceStrategy", **changes))
    runner.val()
    runner.val()
    assert len(calls) == initializes


def test_fsdp1_as_a_wrapper_is_refused(tmp_path: Path) -> None:
    """Its checkpoints would contain only a shard; FSDPStrategy is named instead."""
    with pytest.raises(NotSupportedError, match=r"strategy=dict\(type='FSDPStrategy'\)"):
        Runner(**arguments(tmp_path, cfg={"model_wrapper_cfg": {"type": "MMFullyShardedDataParallel"}}))


@pytest.mark.slow
def test_compile_and_activation_checkpointing_do_not_change_the_training(tmp_path: Path) -> None:
    """A flexible runner with both options gives the weights of a run without them."""

    def trained(name: str, **options: object) -> torch.Tensor:
        torch.manual_seed(0)
        changes = {"val_dataloader": None, "val_cfg": None, "val_evaluator": None, **options}
        model = FlexibleRunner(**arguments(tmp_path / name, strategy="SingleDeviceStrategy", **changes)).train()
        return model.linear.weight.detach()

    plain = trained("plain")
    changed = trained("changed", compile={"backend": "eager"}, cfg={"activation_checkpointing": ["linear"]})
    assert torch.equal(plain, changed)
