"""Compare the variants of a training: equal results, the first difference and its part, exit codes, options and JSON."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import stratagem as package
from stratagem.cli.parity.comparing import compare_all
from stratagem.cli.parity.report import ParityReport, Verdict
from stratagem.cli.parity.training import train_variant
from stratagem.cli.parity.variants import Family, ParitySettings, variant_config, variants, variants_for
from stratagem.config import Config
from stratagem.data import DefaultSampler
from stratagem.errors import ConfigValueError
from stratagem.model import BaseModel
from stratagem.trace import Part

Command = Callable[..., Any]
CONFIG = Path(__file__).with_name("toy_config.py")
SMALL = ("--steps", "4", "--set", "train_dataloader.batch_size=2")
ALONE = (*SMALL, "--nproc", "1")


@pytest.fixture(autouse=True)
def _environment_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package importable in child processes, and limit their threads."""
    monkeypatch.setenv("PYTHONPATH", str(Path(package.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def rows(out: str) -> dict[str, str]:
    """Return the result of each training run by name."""
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in out.splitlines() if line.startswith("│")]
    return {name: result for name, result in cells if name}


def settings(**changes: Any) -> ParitySettings:
    """Return options of the command for a short comparison."""
    return ParitySettings(**{"steps": 3, "nproc": 2, "accumulate": (2,), "resumed": False, **changes})


def toy(**changes: Any) -> Config:
    """Return the toy configuration with a linear layer, so that nothing depends on how the batch is split."""
    config = Config.fromfile(CONFIG)
    config["train_dataloader"]["batch_size"] = 2
    config["model"]["network"] = [{"type": "Linear", "in_features": 2, "out_features": 4}]
    config.merge_from_dict(changes)
    return config


def compare(config: Config, folder: Path, options: ParitySettings) -> ParityReport:
    """Train the variants with one process, and compare them."""
    alone = [each for each in variants_for(config, options) if each.nproc == 1 and not each.key.endswith("again")]
    norms = [train_variant(config, variant, options, folder) for variant in alone]
    return compare_all("toy", config, options, alone, folder, max(norms), None)


def verdicts(report: ParityReport) -> dict[str, Verdict]:
    """Return the verdict of each variant by its key."""
    return {result.variant.key: result.verdict for result in report.results}


# The command.


@pytest.mark.slow
def test_one_process_is_equal_to_itself_and_after_resuming(stratagem: Command, config: str, tmp_path: Path):
    """Repeated and resumed training in one process is bit-identical, even with dropout, and leaves no files behind."""
    done = stratagem("parity", config, *ALONE)
    assert done.status == 0, done.err
    assert rows(done.out) == {
        "one process": "reference",
        "one process, again": "bitwise identical",
        "one process, stopped and resumed": "bitwise identical",
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_variant_that_is_trained_is_shown(stratagem: Command, config: str):
    """The standard error has one line for each variant while the variants train."""
    done = stratagem("parity", config, *ALONE, "--no-resume")
    assert done.err.splitlines() == [
        "[1/4] one process",
        "[2/4] one process, float64",
        "[3/4] one process, gradients rounded differently",
        "[4/4] one process, again",
    ]


@pytest.mark.slow
def test_ranks_and_accumulation_are_equal_up_to_rounding(stratagem: Command, config: str, tmp_path: Path):
    """With dropout in evaluation mode, results are equal up to rounding; resumed ranks are bit-identical."""
    done = stratagem("parity", config, *SMALL, "--eval-layers", "--out", "parity.png")
    assert done.status == 0, done.err
    found = rows(done.out)
    assert found["one process, 2 micro-batches per step"] == "equal up to rounding"
    assert found["2 processes, DDP"] == "equal up to rounding"
    assert found["2 processes, DDP, stopped and resumed"] == "bitwise identical"
    assert "4 steps of 4 samples" in done.out
    assert (
        "10 times the distance of the reference from runs in float64 and with differently rounded gradients" in done.out
    )
    assert "difference / tolerance" in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["parity.png"]
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_sharded_training_is_equal(stratagem: Command, config: str):
    """Shards are gathered for the comparison, and only the given strategies have rows."""
    done = stratagem("parity", config, *SMALL, "--eval-layers", "--strategy", "fsdp", "--accumulate", "4", "--json")
    assert done.status == 0, done.err
    found = {each["variant"]: each["verdict"] for each in json.loads(done.out)["variants"]}
    assert found["2 processes, FSDP"] == "equal up to rounding"
    assert found["2 processes, FSDP, stopped and resumed"] == "bitwise identical"
    assert found["one process, 4 micro-batches per step"] == "equal up to rounding"
    assert "2 processes, DDP" not in found


@pytest.mark.slow
def test_dropout_is_not_comparable(stratagem: Command, config: str):
    """If dropout draws other numbers because the batch is split, the exit code is 2, and the note explains it."""
    done = stratagem("parity", config, *ALONE, "--accumulate", "2", "--no-resume", "--set", "model.network.1.p=0.5",
                     "--set", "model.network.1.type=tests.cli.test_cli_parity.BatchNoise")  # fmt: skip
    assert done.status == 2, done.out
    assert rows(done.out)["one process, 2 micro-batches per step"] == "not comparable"
    assert "draws random numbers (as in dropout)" in done.out
    assert "--eval-layers" in done.out


class BatchNoise(nn.Module):
    """Noise whose first number depends on the size of the batch."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, inputs: Tensor) -> Tensor:
        noise = inputs.new_empty(inputs.shape[::-1]).normal_()
        return inputs + self.p * noise.T


@pytest.mark.slow
def test_a_nondeterministic_training_is_detected(stratagem: Command, config: str):
    """A training whose data changes is different, with exit code 1, and the part is the first one that shows it."""
    done = stratagem("parity", config, *ALONE, "--set", "train_dataloader.dataset.type=ChangingSamples", "--json")
    assert done.status == 1
    again = next(each for each in json.loads(done.out)["variants"] if each["variant"] == "one process, again")
    assert (again["verdict"], again["part"], again["first"]["step"]) == ("DIFFERENT", "forward", 1)


@pytest.mark.slow
def test_the_json_has_all_results(stratagem: Command, config: str):
    """The JSON object contains the result, each variant with its differences by step, and the tolerances."""
    done = stratagem("parity", config, *ALONE, "--eval-layers", "--accumulate", "2", "--no-resume", "--json")
    found = json.loads(done.out)
    assert found.keys() == {
        "title", "result", "exit_status", "steps", "variants", "findings", "tolerances", "notes"
    }  # fmt: skip
    assert (found["result"], found["exit_status"], found["steps"], found["findings"]) == ("equal", 0, 4, [])
    assert [each["variant"] for each in found["variants"]] == [
        "one process",
        "one process, float64",
        "one process, gradients rounded differently",
        "one process, again",
        "one process, 2 micro-batches per step",
    ]
    assert all(
        each.keys() == {"variant", "against", "exact", "verdict", "part", "first", "largest", "by_step", "not_compared"}
        for each in found["variants"]
    )
    accumulated = found["variants"][-1]
    assert (accumulated["against"], accumulated["exact"], accumulated["first"]) == ("one process", False, None)
    assert [each["step"] for each in accumulated["by_step"]] == [1, 2, 3, 4]
    assert all(each["relative"] <= each["tolerance"] for each in accumulated["by_step"])
    assert {"step", "part", "name", "relative", "size"} <= accumulated["largest"].keys()
    assert found["tolerances"][0]["cap"] == 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "text"),
    [("dpp", "Did you mean 'ddp'"), ("ddp,single", "SingleDeviceStrategy is always included as the reference")],
)
def test_an_invalid_strategy(stratagem: Command, config: str, names: str, text: str):
    """An unknown strategy is rejected before training starts."""
    done = stratagem("parity", config, "--strategy", names)
    assert done.status == 2
    assert text in done.err


@pytest.mark.slow
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
        (("--accumulate", "3"), ("8 samples per step", "3 equal micro-batches", "--accumulate")),
        (("--accumulate", "two"), ("--accumulate two", "at least 1")),
        (("--workers", "-1"), ("--workers -1", "at least 0")),
        (("--dtype", "int8"), ("--dtype int8", "Use float32, bfloat16 or float16")),
        (("--dtype", "bfloat16", "--strategy", "deepspeed"), ("--dtype", "DeepSpeedStrategy", "Omit --dtype")),
        (("--optimizer", "Adamm", "--nproc", "1"), ("Adamm",)),
        (("--zero-grad", "(", "--nproc", "1"), ("--zero-grad", "regular expression")),
    ],
    ids=lambda words: words[-1],
)
def test_a_comparison_that_is_impossible(
    stratagem: Command, config: str, words: tuple[str, ...], texts: tuple[str, ...]
):
    """If a variant cannot be trained as requested, the exit code is 2, and the error names the value and the option."""
    done = stratagem("parity", config, *words)
    assert done.status == 2, done.err
    for text in texts:
        assert text in done.err


@pytest.mark.slow
def test_a_variant_that_fails_cannot_be_compared(stratagem: Command, config: str):
    """If training raises an error, the exit code is 2, and the message names the variant and the error."""
    done = stratagem("parity", config, *ALONE, "--set", f"model={{_delete_: true, type: {__name__}.Failing}}")
    assert done.status == 2
    assert "one process: training failed: ZeroDivisionError: no data" in done.err


@pytest.mark.slow
def test_the_number_of_steps_is_limited_by_the_epoch(stratagem: Command, config: str):
    """The length of the epoch limits the number of steps: twenty samples with four per step give five steps."""
    done = stratagem("parity", config, "--steps", "50", "--nproc", "1", "--eval-layers", "--no-resume")
    assert done.status == 0, done.err
    assert "5 steps of 4 samples" in done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("optim_wrapper.optimizer.lr=0.0", "WRONG, schedule: one process: no parameter moved"),
        ("optim_wrapper.paramwise_cfg={freeze: ['.*']}", "The model has no parameters to train"),
        ("model={_delete_: true, type: FrozenModel}", "all 4 parameters of the model are frozen"),
        ("model={_delete_: true, type: ZeroGradients}", "WRONG, backward: one process: no parameter moved"),
    ],
)
def test_a_training_that_does_not_train_is_an_error(stratagem: Command, config: str, change: str, text: str):
    """If no parameter changes, all variants are equal, which must not be reported as success."""
    change = change.replace("FrozenModel", f"{__name__}.FrozenModel").replace("ZeroG", f"{__name__}.ZeroG")
    options = ("--set", change, *(("--set", "optim_wrapper.optimizer.weight_decay=0") if "Zero" in change else ()))
    done = stratagem("parity", config, *ALONE, *options)
    assert done.status != 0
    assert text in done.out + done.err


@pytest.mark.slow
def test_a_gradient_that_is_zero_in_all_steps_is_an_error(stratagem: Command, config: str):
    """A trainable parameter without a gradient is wrong, with exit code 1, unless --zero-grad permits it."""
    change = ("--set", f"model={{_delete_: true, type: {__name__}.WithUnusedLayer}}", "--no-resume")
    done = stratagem("parity", config, *ALONE, *change)
    assert done.status == 1
    assert (
        "WRONG, backward: one process: the gradients of unused.weight, unused.bias are zero in all 4 steps" in done.out
    )
    assert stratagem("parity", config, *ALONE, *change, "--zero-grad", "unused").status == 0


@pytest.mark.slow
def test_samples_that_repeat_within_an_epoch_are_an_error(stratagem: Command, config: str):
    """A sampler that yields a sample twice per epoch is wrong, with exit code 1, although all variants agree."""
    sampler = f"train_dataloader.sampler={{type: {__name__}.EverySampleTwice}}"
    done = stratagem("parity", config, *ALONE, "--no-resume", "--set", sampler)
    assert done.status == 1
    assert re.search(r"WRONG, data: one process: 4 samples repeat within an epoch, such as sample \d+", done.out)


class Failing(BaseModel):
    """A model whose forward pass fails."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, inputs: Any, targets: Any = None, mode: str = "tensor") -> Any:
        raise ZeroDivisionError("no data")


class ZeroGradients(BaseModel):
    """A model whose loss does not depend on its parameters' values, but whose buffers change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)

    def forward(self, inputs: Any, targets: Any = None, mode: str = "tensor") -> Any:
        outputs = self.norm(self.layer(inputs.flatten(1)[:, :2]))
        return {"loss": 0 * outputs.sum() + 1} if mode == "loss" else outputs


class FrozenModel(ZeroGradients):
    """A model whose parameters are all frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class WithUnusedLayer(BaseModel):
    """A model with a layer that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(2, 4), nn.Linear(2, 2)

    def forward(self, inputs: Any, targets: Any = None, mode: str = "tensor") -> Any:
        outputs = self.layer(inputs)
        return {"loss": nn.functional.cross_entropy(outputs, targets)} if mode == "loss" else outputs


class EverySampleTwice(DefaultSampler):  # type: ignore[misc]  # final
    """A sampler that yields each sample twice in a row."""

    def order(self, epoch: int) -> list[int]:
        return [index // 2 for index in range(self.samples)]


# Explanations of differences.


@pytest.mark.slow
def test_batch_normalization_is_not_comparable(tmp_path: Path):
    """Batch normalization explains a difference with accumulation, because it uses the statistics of micro-batches."""
    config = toy()
    config["model"]["network"].append({"type": "BatchNorm1d", "num_features": 4})
    report = compare(config, tmp_path, settings())
    assert verdicts(report)["accumulated_2"] is Verdict.NOT_COMPARABLE
    assert report.exit_status == 2
    assert report.dependence.describe() == "normalizes over the batch in 1 layers"


@pytest.mark.slow
def test_batch_normalization_in_evaluation_mode_is_equal(tmp_path: Path):
    """With --eval-layers, the rest of a model with batch normalization is compared, and is equal."""
    config = toy()
    config["model"]["network"].append({"type": "BatchNorm1d", "num_features": 4})
    report = compare(config, tmp_path, settings(eval_layers=True))
    assert verdicts(report)["accumulated_2"] is Verdict.EQUAL
    assert report.exit_status == 0


@pytest.mark.slow
def test_a_summed_loss_is_detected(tmp_path: Path):
    """A loss with reduction="sum" is detected, because micro-batches and ranks are averaged: half of the sum of four samples."""
    report = compare(toy(**{"model.loss.reduction": "sum"}), tmp_path, settings())
    first = report.results[-1].comparison.first
    assert (report.exit_status, report.results[-1].verdict) == (1, Verdict.DIFFERENT)
    assert (first.step, first.part, first.relative) == (1, Part.FORWARD, pytest.approx(0.5))


# The variants.


def keys(**changes: Any) -> list[str]:
    """Return the keys of the variants for some options."""
    return [each.key for each in variants(settings(**{"accumulate": None, **changes}), accumulates=True)]


def test_each_option_adds_variants():
    """Every axis adds the variants that the documentation lists, each compared with an earlier one."""
    default = ["one", "float64", "rounded", "again", "accumulated_2", "ranks_DDPStrategy"]
    assert keys() == default
    assert set(keys(resumed=True)) - set(default) == {"resumed", "ranks_DDPStrategy_resumed"}
    assert set(keys(nproc=4)) - set(default) == {"accumulated_4"}
    assert set(keys(accumulate=(2, 4))) - set(default) == {"accumulated_4"}
    assert set(keys(strategies=("DDPStrategy", "FSDPStrategy"))) - set(default) == {"ranks_FSDPStrategy"}
    assert set(keys(compiled=True)) - set(default) == {"compiled", "ranks_DDPStrategy_compiled"}
    assert set(keys(workers=(2,))) - set(default) == {"workers_2", "ranks_DDPStrategy_workers_2"}
    assert "workers_2_resumed" in keys(workers=(2,), resumed=True)
    both = keys(optimizers=("SGD", "AdamW"), dtypes=("float32", "bfloat16"))
    assert both == [f"{optim}_{dtype}_{key}" for optim in ("SGD", "AdamW") for dtype in ("float32", "bfloat16")
                    for key in default]  # fmt: skip


def test_each_variant_is_compared_with_an_earlier_one():
    """The reference of a variant comes before it, and has the same optimizer and dtype."""
    listed = variants(
        settings(
            resumed=True, compiled=True, workers=(0, 2), optimizers=("SGD", "AdamW"), strategies=("FSDPStrategy",)
        ),
        accumulates=True,
    )
    known = {}
    for each in listed:
        assert each.against is None or known[each.against].family == each.family
        known[each.key] = each
    assert len(known) == len(listed)


def configured(key: str, config: Config, **changes: Any) -> Config:
    """Return the configuration of a variant."""
    options = settings(**changes)
    variant = next(each for each in variants_for(config, options) if each.key == key)
    return variant_config(config, variant, options, Path("folder"), epoch_length=5)


def test_variants_are_not_tracked():
    """A comparison does not add runs to the stores of trackers, and writes no reports."""
    assert "trackers" not in configured("one", toy(trackers=["csv"]))
    assert configured("one", toy())["report"] is False


def test_the_options_change_the_configuration():
    """Each axis sets the keys of the configuration that the documentation names."""
    config = toy(**{"optim_wrapper.clip_grad": {"max_norm": 1.0}})
    half = configured("SGD_bfloat16_one", config, optimizers=("SGD",), dtypes=("bfloat16",))["optim_wrapper"]
    assert half.to_dict() == {
        "type": "AmpOptimWrapper", "dtype": "bfloat16", "optimizer": {"type": "SGD", "lr": 0.01},
        "clip_grad": {"max_norm": 1.0},
    }  # fmt: skip
    assert configured("float16_one", config, dtypes=("float16",))["optim_wrapper"]["loss_scale"] == 1024.0
    assert "dtype" not in configured("bfloat16_float64", config, dtypes=("bfloat16",))["optim_wrapper"]
    assert configured("workers_2", config, workers=(2,))["train_dataloader"]["num_workers"] == 2
    assert configured("compiled", config, compiled=True)["compile"] is True
    assert configured("one", config, compiled=True)["compile"] is False
    accumulated = configured("accumulated_4", config, accumulate=(4,))
    assert accumulated["optim_wrapper"]["accumulative_counts"] == 4
    assert (accumulated["train_dataloader"]["batch_size"], accumulated["train_cfg"]["max_iters"]) == (1, 12)


@pytest.mark.parametrize(
    ("name", "options"),
    [("FSDPStrategy", {"tp": 2}), ("ColossalAIStrategy", {"plugin": {"type": "hybrid-parallel", "tp_size": 2}})],
)
def test_ranks_that_share_samples_have_larger_batches(name: str, options: dict[str, Any]):
    """Under tensor parallelism over 2 of 4 ranks, a step has the same samples as in one process, in 2 batches instead of 4."""
    config = toy(strategy={"type": name, **options}, **{"train_dataloader.batch_size": 2})
    changes: dict[str, Any] = {"nproc": 4, "strategies": (name,), "accumulate": ()}
    assert configured("one", config, **changes)["train_dataloader"]["batch_size"] == 8
    assert configured(f"ranks_{name}", config, **changes)["train_dataloader"]["batch_size"] == 4
    with pytest.raises(ConfigValueError, match="across 2 ranks, which do not divide .* Set --nproc to a multiple of 2"):
        configured(f"ranks_{name}", config, **{**changes, "nproc": 3})


def test_schedules_count_optimizer_steps_in_all_variants():
    """Schedules in iterations and in epochs become schedules in steps, and those that follow a metric are omitted."""
    config = toy()
    config["param_scheduler"] = [
        {"type": "LinearLR", "start_factor": 0.5, "by_epoch": False, "end": 5},
        {"type": "CosineAnnealingLR", "T_max": 3, "begin": 1, "end": 4},
        {"type": "ReduceOnPlateauLR", "monitor": "loss"},
        {"type": "PolyLR", "begin": 6, "by_epoch": False},
    ]
    expected = [
        {"type": "LinearLR", "start_factor": 0.5, "end": 5, "by": "step"},
        # Five steps per epoch.
        {"type": "CosineAnnealingLR", "T_max": 15, "begin": 5, "end": 20, "by": "step"},
        # The configured run has two epochs, so the schedule has its end after step 10, although parity trains three steps.
        {"type": "PolyLR", "begin": 6, "end": 10, "by": "step"},
    ]
    assert [dict(each) for each in configured("one", config)["param_scheduler"]] == expected
    assert [dict(each) for each in configured("accumulated_2", config)["param_scheduler"]] == expected


def test_averages_begin_at_the_same_step_in_all_variants():
    """begin_iter of an EMAHook counts iterations, so it is multiplied by the additional micro-batches of a variant."""
    config = toy(custom_hooks=[{"type": "EMAHook", "begin_iter": 3, "update_bn": True}])
    assert dict(configured("one", config)["custom_hooks"][0]) == {"type": "EMAHook", "begin_iter": 3}
    assert dict(configured("accumulated_2", config)["custom_hooks"][0]) == {"type": "EMAHook", "begin_iter": 6}


def test_the_name_of_a_family_names_its_optimizer_and_dtype():
    """Variants of a given optimizer and dtype begin with both in the table."""
    assert Family("SGD", "bfloat16").name == "SGD, bfloat16"
    assert Family().name == ""
