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
        (("--strategy", "ddp,fdsp"), "strategy: unknown name 'fdsp'. Did you mean 'fsdp'"),
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


TALKATIVE = """
import torch
from stratagem.registry import DATASETS, MODELS
from torch import nn


@MODELS.register_module()
class Talkative(nn.Linear):
    def forward(self, x):
        print("a line of the model")
        return super().forward(x)


@DATASETS.register_module()
class TalkativeSamples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        print("a line of the dataset")
        return torch.zeros(2), torch.zeros(2)
"""
TALKATIVE_CONFIG = """
custom_imports = dict(imports=["talkative_parts"])
network = dict(type="Talkative", in_features=2, out_features=2)
model = dict(type="SupervisedModel", network=network, loss=dict(type="MSELoss"))
train_dataloader = dict(batch_size=2, dataset=dict(type="TalkativeSamples"))
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1))
del network
"""


@pytest.mark.slow
def test_what_the_model_prints_is_not_part_of_the_json(stratagem: Callable[..., Any], tmp_path: Path) -> None:
    """The output of the model and the dataset goes to stderr, so stdout is valid JSON."""
    (tmp_path / "talkative_parts.py").write_text(TALKATIVE, encoding="utf-8")
    (tmp_path / "talkative.py").write_text(TALKATIVE_CONFIG, encoding="utf-8")
    outcome = stratagem("plan", "talkative.py", "--world", "1", "--json")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["sections"][0]["world"] == 1
    assert "a line of the model" in outcome.err
    assert "a line of the dataset" in outcome.err


@pytest.mark.slow
def test_a_strategy_that_is_given_twice_has_one_row(stratagem: Callable[..., Any], config: str) -> None:
    """Equal names are planned once."""
    outcome = stratagem("plan", config, "--world", "2", "--strategy", "ddp,ddp", "--json")
    (section,) = json.loads(outcome.out)["sections"]
    assert [each["label"] for each in section["strategies"]] == ["DDP"]


@pytest.mark.slow
def test_a_picture_without_bars_is_an_error(stratagem: Callable[..., Any], config: str, tmp_path: Path) -> None:
    """If the strategy does not suit the number of ranks, the report has the reason, and the missing picture is an error."""
    strategy = ("--set", "strategy.type=fsdp", "--set", "strategy.replicate=3")
    outcome = stratagem("plan", config, "--world", "2", *strategy, "--out", "plan.png")
    assert "replicate=3 x tp=1 does not divide the 2 processes" in outcome.out
    assert "plan.png was not written: no strategy can train this model" in " ".join(outcome.err.split())
    assert outcome.status == 2
    assert not (tmp_path / "plan.png").exists()
