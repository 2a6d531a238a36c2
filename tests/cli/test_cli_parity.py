"""Tests of comparing training runs: equal results, the first difference, and its cause."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import stratagem as package
from stratagem.cli.parity.command import ParityReport, train_variant
from stratagem.cli.parity.variants import ParitySettings, Variant, variants
from stratagem.config import Config
from stratagem.model import BaseModel
from stratagem.train.tools.trace_comparison import BatchDependence, Comparison, StepDifference, compare_traces

Command = Callable[..., Any]
CONFIG = Path(__file__).with_name("toy_config.py")
SMALL = ("--steps", "4", "--set", "train_dataloader.batch_size=2")


@pytest.fixture(autouse=True)
def _environment_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package importable in child processes, and limit their threads."""
    monkeypatch.setenv("PYTHONPATH", str(Path(package.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def rows(out: str) -> dict[str, str]:
    """Return the result of each training run by name."""
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in out.splitlines() if line.startswith("│")]
    return {name: result for name, result in cells if name}


def test_one_process_is_equal_to_itself_and_after_resuming(stratagem: Command, config: str, tmp_path: Path):
    """Repeated and resumed training in one process is bit-identical, even with dropout, and leaves no files behind."""
    done = stratagem("parity", config, *SMALL, "--nproc", "1")
    assert done.status == 0, done.err
    assert rows(done.out) == {
        "one process": "reference",
        "one process, again": "bitwise identical",
        "one process, stopped and resumed": "bitwise identical",
    }
    assert "Disabled, because they depend on how the batch is split: param_scheduler." in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ranks_and_accumulation_are_equal_up_to_rounding(stratagem: Command, config: str, tmp_path: Path):
    """With dropout in evaluation mode, results are equal up to rounding; resumed ranks are bit-identical."""
    done = stratagem("parity", config, *SMALL, "--eval-layers")
    assert done.status == 0, done.err
    found = rows(done.out)
    assert found["one process, 2 micro-batches per step"] == "equal up to rounding"
    assert found["2 processes, DDP"] == "equal up to rounding"
    assert found["2 processes, DDP, stopped and resumed"] == "bitwise identical"
    assert "4 steps of 4 samples" in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sharded_training_is_equal(stratagem: Command, config: str):
    """Shards are gathered for the comparison, and only the given strategies have rows."""
    done = stratagem("parity", config, *SMALL, "--eval-layers", "--strategy", "fsdp")
    assert done.status == 0, done.err
    found = rows(done.out)
    assert found["2 processes, FSDP"] == "equal up to rounding"
    assert found["2 processes, FSDP, stopped and resumed"] == "bitwise identical"
    assert "2 processes, DDP" not in found


@pytest.mark.parametrize(
    ("names", "text"),
    [("dpp", "Did you mean 'ddp'"), ("ddp,single", "SingleDeviceStrategy is always included as the reference")],
)
def test_an_invalid_strategy(stratagem: Command, config: str, names: str, text: str):
    """An unknown strategy is rejected before training starts."""
    done = stratagem("parity", config, "--strategy", names)
    assert done.status == 2
    assert text in done.err


def test_dropout_explains_a_difference(tmp_path: Path):
    """Dropout explains a difference between ranks, but not a difference where results must be bit-identical."""
    settings = ParitySettings(steps=2, nproc=2, eval_layers=False, tolerance=1e-4)
    listed = {each.key: each for each in variants(2, accumulates=True)}
    batch_dependence = train_variant(Config.fromfile(CONFIG), listed["one"], settings, tmp_path)
    assert batch_dependence == BatchDependence(uses_rng=True, num_batch_norms=0)
    large = StepDifference(1, "network.0.weight", 0.1, 0.5)
    found = ParityReport({key: Comparison(large, large) for key in listed}, batch_dependence)
    verdicts = {key: found.verdict(each, tolerance=1e-4) for key, each in listed.items() if each.against}
    assert verdicts.pop("ranks_DDPStrategy") == verdicts.pop("accumulated") == "not comparable"
    assert set(verdicts.values()) == {"DIFFERENT"}


def accumulated(config: Config, folder: Path) -> tuple[Variant, ParityReport]:
    """Train in one process with one and with two micro-batches per step, and compare."""
    config["train_dataloader"]["batch_size"] = 2
    settings = ParitySettings(steps=3, nproc=2, eval_layers=False, tolerance=1e-4)
    listed = {each.key: each for each in variants(2, accumulates=True)}
    batch_dependence = train_variant(config, listed["one"], settings, folder)
    train_variant(config, listed["accumulated"], settings, folder)
    compared = compare_traces(folder / "one", folder / "accumulated", 3)
    return listed["accumulated"], ParityReport({"accumulated": compared}, batch_dependence)


def test_batch_normalization_explains_a_difference(tmp_path: Path):
    """Batch normalization explains a difference with accumulation, because it uses the statistics of micro-batches."""
    config = Config.fromfile(CONFIG)
    config["model"]["network"] = [
        {"type": "Linear", "in_features": 2, "out_features": 4},
        {"type": "BatchNorm1d", "num_features": 4},
    ]
    variant, found = accumulated(config, tmp_path)
    assert found.batch_dependence == BatchDependence(uses_rng=False, num_batch_norms=1)
    assert found.verdict(variant, tolerance=1e-4) == "not comparable"


def test_a_summed_loss_is_detected(tmp_path: Path):
    """A loss with reduction="sum" is detected, because micro-batches and ranks are averaged."""
    config = Config.fromfile(CONFIG)
    config["model"]["network"] = [{"type": "Linear", "in_features": 2, "out_features": 4}]
    config["model"]["loss"]["reduction"] = "sum"
    variant, found = accumulated(config, tmp_path)
    assert found.batch_dependence == BatchDependence(uses_rng=False, num_batch_norms=0)
    assert found.verdict(variant, tolerance=1e-4) == "DIFFERENT"
    first = found.comparisons["accumulated"].first
    assert first is not None
    # Half of the sum over all four samples.
    assert (first.step, first.name, first.relative) == (1, "the loss", pytest.approx(0.5))


def test_a_nondeterministic_training_is_detected(stratagem: Command, config: str):
    """A training run that is not reproducible, because its data changes, is detected."""
    done = stratagem("parity", config, *SMALL, "--nproc", "1", "--set", "train_dataloader.dataset.type=ChangingSamples")
    assert done.status == 1
    assert rows(done.out)["one process, again"] == "DIFFERENT"


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (("--set", "train_dataloader.batch_size=8"), ("20 samples", "train_dataloader.batch_size=1")),
        (("--set", "train_dataloader.batch_size=null"), ("batch_size=None", "must be a number")),
        (("--set", "optim_wrapper=null"), ("without optim_wrapper",)),
        (
            (
                "--set",
                "optim_wrapper=null",
                "--set",
                "train_cfg=null",
                "--set",
                "train_dataloader=null",
                "--set",
                "param_scheduler=null",
            ),
            ("has no ", "optim_wrapper", "which parity requires"),
        ),
        (("--set", "optim_wrapper.optimizer.rl=1"), ("'rl'",)),
    ],
    ids=lambda words: words[-1],
)
def test_a_training_that_cannot_be_split(
    stratagem: Command, config: str, words: tuple[str, ...], texts: tuple[str, ...]
):
    """A run that cannot be split raises an error before it trains."""
    done = stratagem("parity", config, *words)
    assert done.status == 2
    for text in texts:
        assert text in done.err


def test_the_number_of_steps_is_limited_by_the_epoch(stratagem: Command, config: str):
    """The length of the epoch limits the number of steps: twenty samples with four per step give five steps."""
    done = stratagem("parity", config, "--steps", "50", "--nproc", "1", "--eval-layers")
    assert done.status == 0, done.err
    assert "5 steps of 4 samples" in done.out


@pytest.mark.parametrize(
    "change",
    [
        "optim_wrapper.optimizer.lr=0.0",
        "optim_wrapper.paramwise_cfg={freeze: ['.*']}",
        "model={_delete_: true, type: FrozenModel}",
        "model={_delete_: true, type: ZeroGradients}",
    ],
)
def test_a_training_that_does_not_train_is_an_error(stratagem: Command, config: str, change: str):
    """If no parameter changes, all variants are equal, which must not be reported as success."""
    change = change.replace("FrozenModel", f"{__name__}.FrozenModel").replace("ZeroG", f"{__name__}.ZeroG")
    options = ("--set", change, *(("--set", "optim_wrapper.optimizer.weight_decay=0") if "Zero" in change else ()))
    done = stratagem("parity", config, *SMALL, *options, "--nproc", "1")
    assert done.status != 0
    assert re.search("[Nn]o param", done.err), done.err


class ZeroGradients(BaseModel):
    """A model whose loss does not depend on its parameters' values, but whose buffers change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)

    def forward(self, inputs: Any, targets: Any = None, mode: str = "tensor") -> Any:
        outputs = self.norm(self.layer(inputs.float().flatten(1)[:, :2]))
        return {"loss": 0 * outputs.sum() + 1} if mode == "loss" else outputs


class FrozenModel(ZeroGradients):
    """A model whose parameters are all frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
