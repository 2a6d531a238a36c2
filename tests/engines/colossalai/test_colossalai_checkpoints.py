"""ColossalAI checkpoints: the portable format of all strategies, exact in every precision, and ColossalAI's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.checkpoint import CheckpointLoader, list_checkpoints, remove_checkpoints, verify_checkpoint
from stratagem.checkpoint.convert.convert import convert_checkpoint
from stratagem.errors import CheckpointDamagedError
from tests.engines.colossalai import boosted_cases, boosted_runs
from tests.support.ranks import Ranks
from tests.support.sharded_runs import EPOCH, OPTIM

pytestmark = [pytest.mark.colossalai, pytest.mark.slow]

AT = 4
NATIVE = {"checkpoint_format": "colossalai"}


@pytest.mark.parametrize("plugin", boosted_runs.PLUGINS)
def test_a_resumed_run_is_bit_identical(two: Ranks, tmp_path: Path, plugin: str) -> None:
    """Master weights, optimizer states, loss scale, and losses are bit-identical, also in lower precision."""
    _require_same_run(two, tmp_path, plugin)


@pytest.mark.parametrize("plugin", ["torch-ddp", "zero 2", "zero 1 bf16", "hybrid bf16", "hybrid tp 2"])
def test_resuming_the_colossalai_format_is_bit_identical(two: Ranks, tmp_path: Path, plugin: str) -> None:
    """A run that resumes from a checkpoint written by the Booster is bit-identical too."""
    _require_same_run(two, tmp_path, plugin, **NATIVE)


@pytest.mark.parametrize("plugin", ["torch-ddp", "zero 1", "zero 1 bf16"])
def test_an_incomplete_accumulation_window_is_saved_with_its_gradients(two: Ranks, tmp_path: Path, plugin: str) -> None:
    """A run saved within an accumulation window takes the same step as the uninterrupted run."""
    _require_same_run(two, tmp_path, plugin, at=5)


@pytest.mark.parametrize("optimizer", ["HybridAdam", "Lamb"])
def test_resuming_colossalai_optimizers_is_bit_identical(two: Ranks, tmp_path: Path, optimizer: str) -> None:
    """The states of ColossalAI's optimizers are saved by parameter name, like those of torch optimizers."""
    optim = {**OPTIM, "optimizer": {"type": optimizer, "lr": 0.01, "weight_decay": 0.1}}
    _require_same_run(two, tmp_path, "zero 1", optim=optim)


@pytest.mark.parametrize("saver", ["zero 1 bf16", "zero 2", "hybrid tp 2", "DDP x2", "FSDP x2"])
@pytest.mark.parametrize("reader", ["DDP x2", "FSDP x2", "zero 1", "zero 2", "hybrid tp 2"])
def test_checkpoints_can_be_resumed_by_any_strategy(two: Ranks, tmp_path: Path, saver: str, reader: str) -> None:
    """Weights, optimizer states, rates, and options are restored exactly; the losses equal those of DDP."""
    ours = boosted_runs.PLUGINS
    if saver not in ours and reader not in ours:
        pytest.skip("both are torch's own; other tests compare them")
    saved = two.run(boosted_runs.stopped, saver, str(tmp_path), str(tmp_path / "at"), AT)[0]["before"]
    found = two.run(boosted_runs.resumed, reader, str(tmp_path), str(tmp_path / "at"), AT)
    replicated = two.run(boosted_runs.resumed, "DDP x2", str(tmp_path), str(tmp_path / "at"), AT)[0]
    for each in found:
        _require_bits(each["found"], saved)
        assert each["after"]["losses"] == pytest.approx(replicated["after"]["losses"], abs=1e-5)
        assert each["after"]["rates"] == replicated["after"]["rates"]


@pytest.mark.parametrize("plugin", ["zero 2 bf16", "hybrid tp 2"])
def test_checkpoints_can_be_resumed_on_any_number_of_ranks(
    two: Ranks, four: Ranks, tmp_path: Path, plugin: str
) -> None:
    """A checkpoint of two ranks can be resumed on four ranks, and one of four ranks in a single process, bit for bit."""
    saved = two.run(boosted_runs.stopped, plugin, str(tmp_path), str(tmp_path / "two"), AT)[0]["before"]
    for each in four.run(boosted_runs.resumed_and_saved, plugin, str(tmp_path), tmp_path / "two", tmp_path / "four"):
        _require_bits(each, saved)
    alone = boosted_runs.resumed("single", str(tmp_path), str(tmp_path / "four"), AT)
    _require_bits(alone["found"], saved)


@pytest.mark.parametrize("plugin", ["zero 1", "zero 1 bf16", "hybrid tp 2"])
def test_the_colossalai_format_can_be_converted(two: Ranks, tmp_path: Path, plugin: str) -> None:
    """`stratagem ckpt convert` needs no ColossalAI, and one process resumes from the result."""
    saved = two.run(boosted_runs.stopped, plugin, str(tmp_path), str(tmp_path / "own"), AT, **NATIVE)[0]["before"]
    convert_checkpoint(tmp_path / "own", tmp_path / "ours")
    assert not (tmp_path / "ours" / "model").exists()
    _require_bits(boosted_runs.resumed("single", str(tmp_path), str(tmp_path / "ours"), AT)["found"], saved)


def test_a_directory_saved_by_the_booster_can_be_converted(two: Ranks, tmp_path: Path) -> None:
    """A directory that another program saved with the Booster can be converted too; its optimizer state is keyed by index."""
    saved = two.run(boosted_runs.stopped, "torch-ddp", str(tmp_path), str(tmp_path / "own"), AT, **NATIVE)[0]["before"]
    for file in (tmp_path / "own").iterdir():
        if file.is_file():
            file.unlink()
    convert_checkpoint(tmp_path / "own", tmp_path / "ours")
    tree = CheckpointLoader.load_checkpoint(tmp_path / "ours")
    assert sorted(tree) == ["optimizer", "state_dict"]
    for name, value in tree["state_dict"].items():
        assert torch.equal(value, saved["weights"][name])
    moments = [slots["exp_avg"] for slots in tree["optimizer"]["state"].values()]
    assert sum(map(torch.numel, moments)) == sum(
        value.numel() for name, value in saved["moments"].items() if name.endswith("/exp_avg")
    )


def test_the_colossalai_format_is_listed_verified_and_removed(two: Ranks, tmp_path: Path) -> None:
    """Listing, verifying, and removing checkpoints include the files that the Booster wrote."""
    two.run(boosted_runs.stopped, "zero 1", str(tmp_path), str(tmp_path / "epoch_1"), AT, **NATIVE)
    assert [each.path.name for each in list_checkpoints(tmp_path) if not each.fault] == ["epoch_1"]
    assert verify_checkpoint(tmp_path / "epoch_1") > 0
    file = tmp_path / "epoch_1" / "optimizer" / "pytorch_optim-00001.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match=r"pytorch_optim-00001.bin is corrupted"):
        verify_checkpoint(tmp_path / "epoch_1")
    remove_checkpoints([tmp_path / "epoch_1"], boosted_cases.LOGGER)
    assert not (tmp_path / "epoch_1").exists()


def test_the_colossalai_format_cannot_be_saved_in_the_background(two: Ranks, tmp_path: Path) -> None:
    """The Booster can only save synchronously, and the error names the setting to change."""
    for error_message in two.run(
        boosted_cases.error_message, boosted_cases.saved_in_background, str(tmp_path), **NATIVE
    ):
        assert "Set async_save=False, or checkpoint_format='portable'" in error_message


def test_the_portable_format_is_saved_in_the_background(two: Ranks, tmp_path: Path) -> None:
    """A background save holds the state of the step at which it started, although training continues."""
    for before, found in two.run(boosted_cases.saved_in_background, str(tmp_path)):
        _require_bits(found, before)


def test_a_single_file_contains_unsharded_tensors(two: Ranks, tmp_path: Path) -> None:
    """A name with the suffix .pth gathers master weights and optimizer states in one torch file."""
    saved = two.run(boosted_runs.stopped, "zero 1 bf16", str(tmp_path), str(tmp_path / "at.pth"), AT)[0]["before"]
    alone = boosted_runs.resumed("single", str(tmp_path), str(tmp_path / "at.pth"), AT)
    _require_bits(alone["found"], saved)


def test_weights_of_a_different_model_are_rejected(two: Ranks, tmp_path: Path) -> None:
    """An unexpected parameter raises an error that names it, and nothing is loaded."""
    for error_message in two.run(boosted_cases.error_message, boosted_cases.resumed_with_more, str(tmp_path)):
        assert "1 unexpected in the checkpoint: extra" in error_message


def _require_same_run(two: Ranks, folder: Path, plugin: str, at: int = AT, **options: Any) -> None:
    whole = two.run(boosted_runs.stopped, plugin, str(folder), str(folder / "at"), at, **options)
    again = two.run(boosted_runs.resumed, plugin, str(folder), str(folder / "at"), at, **options)
    for unbroken, resumed in zip(whole, again, strict=True):
        _require_bits(resumed["found"], unbroken["before"])
        assert resumed["found"]["scale"] == unbroken["before"]["scale"]
        assert resumed["found"]["groups"] == unbroken["before"]["groups"]
        assert len(resumed["after"]["losses"]) == EPOCH - at
        assert resumed["after"]["losses"] == unbroken["after"]["losses"]
        assert resumed["after"]["rates"] == unbroken["after"]["rates"]
        _require_bits(resumed["after"], unbroken["after"])


def _require_bits(found: dict[str, Any], saved: dict[str, Any]) -> None:
    for kind in ("weights", "moments"):
        assert sorted(found[kind]) == sorted(saved[kind])
        for name, value in saved[kind].items():
            # Frozen parameters are saved in the compute dtype.
            there = value.to(found[kind][name].dtype)
            assert torch.equal(found[kind][name], there), name
