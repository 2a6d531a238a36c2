"""The runner of the MMEngine layer trains, stops and resumes as the engine does, with MMEngine's interface."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from stratagem.compat.mmengine.evaluator import BaseMetric
from stratagem.compat.mmengine.hooks import Hook
from stratagem.compat.mmengine.logging import HistoryBuffer, print_log
from stratagem.compat.mmengine.model import BaseModel, BaseTTAModel
from stratagem.compat.mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, load_checkpoint
from stratagem.compat.mmengine.runner.checkpoint import load_from_local
from stratagem.errors import ConfigValueError


class Model(BaseModel):
    """Dropout draws from the global generator in each iteration."""

    def __init__(self):
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(4, 1)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        output = self.linear(self.drop(torch.stack(inputs)))
        return {"loss": output.square().mean()} if mode == "loss" else list(output)


class Noisy(Dataset):
    """Ten samples with noise from NumPy's global generator."""

    @property
    def metainfo(self):
        return {"classes": ("a", "b")}

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"inputs": torch.full((4,), index / 10 + float(np.random.rand()))}


class Mean(BaseMetric):
    """The mean prediction."""

    def process(self, data_batch, data_samples):
        self.results += [float(each) for each in data_samples]

    def compute_metrics(self, results):
        return {"mean": float(np.mean(results))}


class Record(Hook):
    """Records the losses, and calls ``at(runner)`` in one iteration."""

    priority = "LOWEST"

    def __init__(self, stop=None, at=None):
        self.losses, self.validated = {}, []
        self.stop, self.at = stop, at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses[runner.iter] = float(outputs["loss"].detach())
        if runner.iter == self.stop:
            self.at(runner)

    def after_val_epoch(self, runner, metrics=None):
        self.validated.append(runner.iter)


VALIDATION = {
    "val_dataloader": {
        "dataset": Noisy(), "batch_size": 2, "num_workers": 0, "sampler": {"type": "DefaultSampler", "shuffle": False}
    },
    "val_cfg": {}, "val_evaluator": [Mean(prefix="x")],
}  # fmt: skip


class KilledError(Exception):
    """Ends a run without saving it."""


def kill(runner):
    raise KilledError


def build(folder: Path, record: Record, *, loop=None, data=None, **changes):
    """Return a runner that saves a checkpoint every third iteration of 3 epochs with 5 batches."""
    torch.manual_seed(0)  # of the initial weights
    loop = {"type": EpochBasedTrainLoop, "max_epochs": 3, "val_interval": 10} if loop is None else loop
    loader = {
        "dataset": Noisy(),
        "batch_size": 2,
        "num_workers": 0,
        "sampler": {"type": "DefaultSampler", "shuffle": True},
    }
    arguments = {
        "model": Model(),
        "work_dir": str(folder),
        "train_dataloader": loader if data is None else data,
        "train_cfg": loop,
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
        "param_scheduler": {"type": "StepLR", "step_size": 4, "by_epoch": False},
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 3, "by_epoch": False}},
        "custom_hooks": [record],
        "randomness": {"seed": 3},
        "experiment_name": f"{folder.name}_{record.stop}_{changes.get('resume')}",
        **changes,
    }
    return Runner(**arguments)


def losses_of_resumed(folder: Path, **arguments):
    """Kill a run in iteration 7, which was saved in iteration 6, and return the losses of the resumed run."""
    with pytest.raises(KilledError):
        build(folder, Record(7, kill), **arguments).train()
    record = Record()
    build(folder, record, resume=True, **arguments).train()
    return record.losses


def losses_of_whole(folder: Path, **arguments):
    """Return the losses of a run without interruption from iteration 6 on."""
    record = Record()
    build(folder, record, **arguments).train()
    return {number: loss for number, loss in record.losses.items() if number >= 6}


class PlainEpochs(EpochBasedTrainLoop):
    """Iterates over the loader itself, as loops of users do."""

    def run_epoch(self):
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for idx, data_batch in enumerate(self.dataloader):
            self.run_iter(idx, data_batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


class Skipping(IterBasedTrainLoop):
    """Skips the batches of earlier sessions itself, as MMEngine's loop does."""

    def run(self):
        self.runner.call_hook("before_train")
        for _ in range(self._iter):
            next(self.dataloader_iterator)
        while self._iter < self._max_iters:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
        self.runner.call_hook("after_train")


@pytest.mark.slow
@pytest.mark.parametrize(
    "loop",
    [
        {"by_epoch": True, "max_epochs": 3},
        {"by_epoch": False, "max_iters": 14},
        {"type": PlainEpochs, "max_epochs": 3},
        {"type": Skipping, "max_iters": 14},
    ],
    ids=["epochs", "iterations", "own run_epoch", "own run"],
)
def test_a_killed_run_resumes_exactly(tmp_path, loop):
    """The resumed run has the losses of a run without interruption: data, noise, dropout, momentum and schedule continue."""
    whole = losses_of_whole(tmp_path / "whole", loop=loop)
    assert losses_of_resumed(tmp_path / "killed", loop=loop) == whole


@pytest.mark.slow
def test_a_killed_run_with_a_compiled_model_resumes_exactly(tmp_path):
    """The compiled model trains, validates, is saved under its own names, and resumes."""
    section = {
        **VALIDATION,
        "cfg": {"compile": {"backend": "aot_eager"}},
        "loop": {"type": EpochBasedTrainLoop, "max_epochs": 3},
    }
    whole = losses_of_whole(tmp_path / "whole", **section)
    assert losses_of_resumed(tmp_path / "killed", **section) == whole
    names = list(torch.load(tmp_path / "killed/iter_15.pth", weights_only=True)["state_dict"])
    assert names == ["linear.weight", "linear.bias"]


@pytest.mark.slow
def test_a_killed_run_resumes_exactly_with_a_loader_of_the_user(tmp_path):
    """A shuffled DataLoader that the user has built continues within its epoch."""
    whole = losses_of_whole(tmp_path / "whole", data=loader_of_user())
    assert losses_of_resumed(tmp_path / "killed", data=loader_of_user()) == whole


def loader_of_user():
    return DataLoader(
        Noisy(), batch_size=2, shuffle=True, collate_fn=lambda samples: {"inputs": [s["inputs"] for s in samples]}
    )


@pytest.mark.slow
def test_a_run_with_global_random_numbers_resumes_exactly(tmp_path):
    """With MMEngine's data order, samples draw from the global generators, whose state is part of the checkpoint."""
    section = {"cfg": {"stratagem": {"data_order": "mmengine"}}}
    assert losses_of_resumed(tmp_path / "killed", **section) == losses_of_whole(tmp_path / "whole", **section)


@pytest.mark.slow
def test_a_signal_saves_the_run_and_ends_the_program(tmp_path):
    """After SIGTERM, the run is saved at once, and the exit code is that of the signal."""
    with pytest.raises(SystemExit) as caught:
        build(tmp_path, Record(4, lambda runner: os.kill(os.getpid(), signal.SIGTERM))).train()
    assert caught.value.code == 128 + signal.SIGTERM
    latest = max(int(path.stem.removeprefix("iter_")) for path in tmp_path.glob("iter_*.pth"))
    record = Record()
    build(tmp_path, record, resume=True).train()
    assert 5 <= latest <= 7
    assert min(record.losses) == latest


@pytest.mark.slow
def test_a_validation_that_a_kill_prevented_is_repeated(tmp_path):
    """A checkpoint is saved at the end of an epoch before its validation, so the resumed run validates first."""
    validation = {
        **VALIDATION,
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        "loop": {"by_epoch": True, "max_epochs": 2},
    }

    class Dying(Hook):
        def before_val(self, runner):
            raise KilledError

    first = Record()
    with pytest.raises(KilledError):
        build(tmp_path, first, **{**validation, "custom_hooks": [first, Dying()]}).train()
    record = Record()
    build(tmp_path, record, resume=True, **validation).train()
    assert first.validated == []
    assert record.validated == [5, 10]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["stratagem", "mmengine"])
def test_a_run_killed_after_a_validation_does_not_repeat_it(tmp_path, order):
    """The resumed run continues after the validation, with its values and with the random numbers that it has left."""
    validation = {
        **VALIDATION,
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        "cfg": {"stratagem": {"data_order": order}},
        "loop": {"by_epoch": True, "max_epochs": 3},
    }
    whole = Record()
    finished = build(tmp_path / "whole", whole, **validation)
    finished.train()
    with pytest.raises(KilledError):
        build(tmp_path / "killed", Record(5, kill), **validation).train()
    record = Record()
    resumed = build(tmp_path / "killed", record, resume=True, **validation)
    resumed.train()
    assert whole.validated == [5, 10, 15]
    assert record.validated == [10, 15]
    assert record.losses == {number: loss for number, loss in whole.losses.items() if number >= 5}
    values, _ = resumed.message_hub.get_scalar("val/x/mean").data
    assert values.tolist() == finished.message_hub.get_scalar("val/x/mean").data[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["early stopping", "plateau", "hook"])
def test_a_validation_that_may_have_changed_the_checkpoint_is_repeated(tmp_path, cause):
    """The checkpoint was saved before; a stopped run, a schedule that follows a metric or a hook's entry needs the repetition."""

    class Extra(Hook):
        def before_save_checkpoint(self, runner, checkpoint):
            checkpoint["extra"] = 1

    first, second = Record(5, kill), Record()
    stopping = {"type": "EarlyStoppingHook", "monitor": "x/mean", "stopping_threshold": -1e9, "rule": "greater"}
    plateau = {"type": "ReduceOnPlateauLR", "monitor": "x/mean", "by_epoch": True}
    for record, resume in ((first, False), (second, True)):
        hooks = [record, *([stopping] if cause == "early stopping" else [Extra()] if cause == "hook" else [])]
        changes = {
            **VALIDATION,
            "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1}},
            "loop": {"by_epoch": True, "max_epochs": 2},
            "param_scheduler": plateau if cause == "plateau" else None,
            "custom_hooks": hooks,
        }
        runner = build(tmp_path, record, resume=resume, **changes)
        if cause == "early stopping" or resume:
            runner.train()
        else:
            with pytest.raises(KilledError):
                runner.train()
    assert first.validated == [5]
    assert second.validated[0] == 5


@pytest.mark.slow
@pytest.mark.parametrize("averages", [False, True])
def test_a_signal_during_a_validation_saves_the_run_and_the_validation_is_repeated(tmp_path, averages):
    """The run is saved with the random states before the validation, so the resumed run equals one without interruption."""

    class Interrupting(Hook):
        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 10 and batch_idx == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    validation = {
        **VALIDATION,
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 3}},
        "cfg": {"stratagem": {"data_order": "mmengine"}},
        "loop": {"by_epoch": True, "max_epochs": 3},
    }
    whole, first, record = Record(), Record(), Record()
    hooks = [{"type": "EMAHook", "momentum": 0.5}] if averages else []
    build(tmp_path / "whole", whole, **validation, custom_hooks=[whole, *hooks]).train()
    with pytest.raises(SystemExit) as caught:
        build(tmp_path / "stopped", first, **validation, custom_hooks=[first, Interrupting(), *hooks]).train()
    assert caught.value.code == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "stopped").glob("*.pth")] == ["iter_10.pth"]
    resumed = build(tmp_path / "stopped", record, resume=True, **validation, custom_hooks=[record, *hooks])
    resumed.train()
    assert (first.validated, record.validated) == ([5], [10, 15])
    assert record.losses == {number: loss for number, loss in whole.losses.items() if number >= 10}


@pytest.mark.slow
def test_a_signal_during_a_validation_waits_for_hooks_that_may_have_replaced_the_weights(tmp_path):
    """A hook that sets other weights before a validation restores them after it, and only then is the run saved."""

    class Replacing(Hook):
        def before_val_epoch(self, runner):
            self.kept = runner.model.linear.weight.detach().clone()
            nn.init.zeros_(runner.model.linear.weight)
            os.kill(os.getpid(), signal.SIGTERM)

        def after_val_epoch(self, runner, metrics=None):
            runner.model.linear.weight.data.copy_(self.kept)

    record = Record()
    loop = {"by_epoch": True, "max_epochs": 3}
    with pytest.raises(SystemExit):
        build(tmp_path, record, **VALIDATION, loop=loop, custom_hooks=[record, Replacing()]).train()
    assert record.validated == [5]
    saved = torch.load(tmp_path / "iter_6.pth", weights_only=True)
    assert saved["state_dict"]["linear.weight"].abs().min() > 0


@pytest.mark.slow
def test_a_validation_without_training_does_not_save_the_best_checkpoint(tmp_path):
    """A run that is only validated returns the metrics and changes no checkpoint, also after a training."""
    checkpoint = {"type": "CheckpointHook", "save_best": "x/mean", "rule": "less"}
    runner = build(tmp_path, Record(), **VALIDATION, default_hooks={"checkpoint": checkpoint})
    assert set(runner.val()) == {"x/mean"}
    assert list(tmp_path.glob("*.pth")) == []
    runner.train()
    saved = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pth")}
    nn.init.constant_(runner.model.linear.bias, -100.0)
    assert runner.val()["x/mean"] < -50
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pth")} == saved


def test_checkpoints_have_the_layout_of_mmengine_and_contain_no_code(tmp_path):
    """torch.load(weights_only=True) returns the parts that MMEngine reads; the keys of the optimizer state are indices."""
    build(tmp_path, Record(), loop={"by_epoch": False, "max_iters": 3}).train()
    checkpoint = torch.load(tmp_path / "iter_3.pth", weights_only=True)
    assert {"meta", "state_dict", "optimizer", "param_schedulers", "message_hub"} <= set(checkpoint)
    assert {key: checkpoint["meta"][key] for key in ("epoch", "iter", "seed")} == {"epoch": 0, "iter": 3, "seed": 3}
    assert sorted(checkpoint["optimizer"]["state"]) == [0, 1]
    assert checkpoint["optimizer"]["param_groups"][0]["params"] == [0, 1]
    assert checkpoint["message_hub"]["runtime_info"]["iter"] == 2
    assert list(checkpoint["state_dict"]) == ["linear.weight", "linear.bias"]


@pytest.mark.slow
def test_histories_of_a_checkpoint_of_mmengine_are_restored(tmp_path):
    """MMEngine pickles histories as objects and has no data position; both are restored from the file and the iteration."""
    build(tmp_path / "saved", Record(), loop={"by_epoch": False, "max_iters": 6}).train()
    checkpoint = torch.load(tmp_path / "saved/iter_6.pth", weights_only=True)
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    foreign = {key: checkpoint[key] for key in ("state_dict", "optimizer", "param_schedulers")}
    foreign["meta"] = {"epoch": 1, "iter": 6, "seed": 3, "mmengine_version": "0.10.7"}
    foreign["message_hub"] = {
        "log_scalars": {"val/x": history},
        "runtime_info": {"best_score": 0.5},
        "resumed_keys": {"val/x": True, "best_score": True},
    }
    torch.save(foreign, tmp_path / "foreign.pth")
    record = Record()
    runner = build(tmp_path / "resumed", record, load_from=str(tmp_path / "foreign.pth"), resume=True)
    runner.train()
    assert runner.message_hub.get_info("best_score") == 0.5
    assert runner.message_hub.get_scalar("val/x").data[0].tolist() == [1.0, 2.0]
    assert sorted(record.losses) == list(range(6, 15))


def test_lines_after_a_run_are_in_its_log_which_is_closed_again(tmp_path):
    """Code that logs to the current logger after the run, or initializes another model, keeps no file of the run open."""
    build(tmp_path, Record(), loop={"by_epoch": False, "max_iters": 3}).train()
    print_log("a late line", logger="current")
    Model().init_weights()
    log = next(tmp_path.glob("*/*.log"))
    lines = log.read_text().splitlines()
    assert [line for line in lines if line.endswith("a late line")]
    assert (
        "linear.weight - torch.Size([1, 4]): " in lines[lines.index("Name of parameter - Initialization information") :]
    )
    assert [each.path for each in psutil.Process().open_files() if Path(each.path).is_relative_to(tmp_path)] == []


def test_a_file_with_objects_is_not_executed(tmp_path):
    """An entry with an object is skipped, and weights that contain one are refused."""
    torch.save({"state_dict": {"linear.bias": torch.ones(1)}, "hook": KilledError()}, tmp_path / "some.pth")
    assert set(load_from_local(str(tmp_path / "some.pth"))) == {"state_dict"}
    torch.save({"state_dict": {"linear.bias": KilledError()}}, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match="No code from the file was executed"):
        load_checkpoint(Model(), str(tmp_path / "weights.pth"))


def test_an_unknown_data_order_is_refused(tmp_path):
    """The section that MMEngine ignores is checked."""
    with pytest.raises(ConfigValueError, match="data_order='torch'"):
        build(tmp_path, Record(), cfg={"stratagem": {"data_order": "torch"}})


class Averaging(BaseTTAModel):
    """Keeps the first prediction."""

    def merge_preds(self, data_samples_list):
        return [samples[0] for samples in data_samples_list]


@pytest.mark.slow
def test_load_from_loads_the_model_inside_a_test_time_augmentation_model(tmp_path):
    """The test scripts of OpenMMLab wrap the model and set ``load_from`` to the checkpoint of the model inside."""
    trained = build(tmp_path / "trained", Record())
    trained.train()
    runner = build(
        tmp_path / "tested",
        Record(),
        model=Averaging(module=Model()),
        load_from=str(tmp_path / "trained" / "iter_15.pth"),
    )
    with runner._session.evaluating():  # closes the log files at its end
        runner._load_or_resume(training=False)
    torch.testing.assert_close(runner.model.module.state_dict(), trained.model.state_dict(), rtol=0, atol=0)
