"""Trainings with mmpretrain's and mmsegmentation's own tools, beside MMEngine: losses, kills, resuming, testing, ranks."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.openmmlab import trainings
from tests.openmmlab.jobs import DEIT, FCN, RESNET, SIMSIAM
from tests.openmmlab.trainings import Engine, Training, losses, scores

pytestmark = [pytest.mark.openmmlab, pytest.mark.timeout(900)]

# The order of the data and the random numbers of MMEngine, so that the losses can be compared.
AS_MMENGINE = ("stratagem.data_order=mmengine",)
FREQUENT = ("default_hooks.checkpoint.by_epoch=False", "default_hooks.checkpoint.interval=4")
FSDP = ("strategy.type=FSDPStrategy",)
COMPARED = 20


class Runs:
    """Runs trainings in folders of their own, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data: dict[object, Path] = {}
        self._done: dict[object, Path] = {}

    def data(self, training: Training) -> Path:
        """Return the folder of the pictures, which are written on first use."""
        if training.data not in self._data:
            self._data[training.data] = training.data(self._folder / training.data.__name__)
        return self._data[training.data]

    def new_work_dir(self) -> Path:
        """Return a path that no training has used."""
        return self._folder / f"run_{len(list(self._folder.iterdir()))}" / "work"

    def finished(self, training: Training, engine: Engine, options: Sequence[str] = (), ranks: int = 1) -> Path:
        """Return the working directory of a training that ran to its end."""
        key = (id(training), engine, tuple(options), ranks)
        if key not in self._done:
            work_dir = self.new_work_dir()
            trainings.train(training, engine, self.data(training), work_dir, options, ranks=ranks)
            self._done[key] = work_dir
        return self._done[key]

    def killed_and_resumed(self, training: Training, options: Sequence[str], ranks: int = 1) -> tuple[Path, int]:
        """Kill a training after a random iteration and resume it; return the working directory and the iteration."""
        work_dir, iteration = self.new_work_dir(), random.randrange(6, 20)
        data = self.data(training)
        trainings.train_and_kill(training, "stratagem", data, work_dir, options, iteration=iteration, ranks=ranks)
        trainings.train(training, "stratagem", data, work_dir, options, ranks=ranks, resume=True)
        return work_dir, iteration


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return the trainings of this session."""
    return Runs(tmp_path_factory.mktemp("openmmlab"))


def first(work_dir: Path) -> list[float]:
    """Return the losses of the first iterations."""
    by_iteration = losses(work_dir)
    return [by_iteration[iteration] for iteration in range(1, COMPARED + 1)]


def last_checkpoint(work_dir: Path) -> dict:
    """Return the last checkpoint of a training."""
    return torch.load((work_dir / "last_checkpoint").read_text().strip(), weights_only=False)


def assert_same_weights(first: Path, second: Path) -> None:
    """Require bitwise equal weights in the last checkpoints of two trainings."""
    expected, actual = last_checkpoint(first)["state_dict"], last_checkpoint(second)["state_dict"]
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


@pytest.mark.parametrize(
    ("training", "metric"),
    [
        pytest.param(RESNET, "accuracy/top1", id="resnet"),
        pytest.param(DEIT, "accuracy/top1", id="deit"),
        pytest.param(SIMSIAM, None, id="simsiam", marks=pytest.mark.slow),
        pytest.param(FCN, "mIoU", id="fcn", marks=pytest.mark.slow),
    ],
)
def test_losses_equal_those_of_mmengine(runs: Runs, training: Training, metric: str | None) -> None:
    """The losses of the first 20 iterations equal MMEngine's to 1e-6, and so do the scores of the validations."""
    expected = runs.finished(training, "mmengine")
    actual = runs.finished(training, "stratagem", AS_MMENGINE)
    print(*(f"{theirs:.7f} {ours:.7f}" for theirs, ours in zip(first(expected), first(actual), strict=True)), sep="\n")
    assert first(actual) == pytest.approx(first(expected), rel=1e-6)
    if metric is not None:
        assert scores(actual, metric) == pytest.approx(scores(expected, metric))


def test_a_killed_training_resumes_exactly(runs: Runs) -> None:
    """A training that is killed in an epoch and resumed has the losses and the weights of one that is not killed."""
    expected = runs.finished(RESNET, "stratagem", FREQUENT)
    actual, iteration = runs.killed_and_resumed(RESNET, FREQUENT)
    assert losses(actual) == losses(expected), f"killed after iteration {iteration}"
    assert_same_weights(expected, actual)


def test_the_best_checkpoint_has_its_score_in_a_test(runs: Runs) -> None:
    """tools/test.py computes the score of the best checkpoint that the validation recorded."""
    work_dir = runs.finished(RESNET, "stratagem", FREQUENT)
    (best,) = trainings.best(work_dir)
    output = trainings.test(RESNET, "stratagem", runs.data(RESNET), runs.new_work_dir(), best)
    (score,) = re.findall(r"Epoch\(test\).*accuracy/top1: ([\d.]+)", output)
    assert float(score) == pytest.approx(max(scores(work_dir, "accuracy/top1")), abs=1e-4)


@pytest.mark.parametrize("options", [pytest.param((), id="ddp"), pytest.param(FSDP, id="fsdp", marks=pytest.mark.slow)])
def test_a_killed_training_resumes_exactly_on_two_ranks(runs: Runs, options: tuple[str, ...]) -> None:
    """With DDP and with FSDP on two ranks, a killed and resumed training has the losses of one that is not killed."""
    expected = runs.finished(DEIT, "stratagem", (*FREQUENT, *options), ranks=2)
    actual, iteration = runs.killed_and_resumed(DEIT, (*FREQUENT, *options), ranks=2)
    assert losses(actual) == losses(expected), f"killed after iteration {iteration}"
    assert_same_weights(expected, actual)


@pytest.mark.slow
def test_fsdp_has_the_losses_of_ddp(runs: Runs) -> None:
    """Sharding the model does not change the losses beyond rounding."""
    ddp = runs.finished(DEIT, "stratagem", FREQUENT, ranks=2)
    fsdp = runs.finished(DEIT, "stratagem", (*FREQUENT, *FSDP), ranks=2)
    assert list(losses(fsdp).values()) == pytest.approx(list(losses(ddp).values()), rel=1e-3)


def resumed(runs: Runs, engine: Engine, source: Path, options: Sequence[str]) -> Path:
    """Return the working directory of a training that an engine resumes after the first epoch of another one."""
    work_dir = runs.new_work_dir()
    work_dir.mkdir(parents=True)
    shutil.copy(source / "epoch_1.pth", work_dir)
    (work_dir / "last_checkpoint").write_text(str(work_dir / "epoch_1.pth"))
    trainings.train(RESNET, engine, runs.data(RESNET), work_dir, options, resume=True)
    return work_dir


def test_checkpoints_of_mmengine_resume_here(runs: Runs) -> None:
    """Both engines resume a checkpoint of MMEngine after the same epoch, with the same losses."""
    source = runs.finished(RESNET, "mmengine")
    expected = resumed(runs, "mmengine", source, ())
    actual = resumed(runs, "stratagem", source, AS_MMENGINE)
    assert min(losses(actual)) == COMPARED + 1
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.slow
def test_checkpoints_resume_in_mmengine(runs: Runs) -> None:
    """MMEngine resumes a checkpoint that was saved here like its own of the same training."""
    expected = resumed(runs, "mmengine", runs.finished(RESNET, "mmengine"), ())
    actual = resumed(runs, "mmengine", runs.finished(RESNET, "stratagem", AS_MMENGINE), ())
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-4)
