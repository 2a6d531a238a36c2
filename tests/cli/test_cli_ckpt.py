"""Looking at checkpoints from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stratagem.checkpoint import find_latest_checkpoint, read_any, save_checkpoint

Command = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with two checkpoints."""
    for epoch in (1, 2):
        save_checkpoint(
            {
                "state_dict": {"w": torch.full((2, 2), float(epoch))},
                "meta": {"epoch": epoch, "iter": 10 * epoch, "cfg": "lr = 0.1\n", "experiment_name": "toy"},
                "average": {"steps": 1, "averages": {"w": torch.full((2, 2), 0.25)}},
            },
            tmp_path / "runs" / "toy" / f"epoch_{epoch}",
        )
    return tmp_path / "runs" / "toy"


def damage(checkpoint: Path) -> None:
    """Flip a bit of the last number of the model."""
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_ls_names_the_newest_first(stratagem: Command, run: Path) -> None:
    """`ckpt ls` prints each checkpoint with its epoch, iteration and state."""
    listed = stratagem("ckpt", "ls", run)
    lines = [line.split() for line in listed.out.splitlines()]
    assert [line[0] for line in lines] == ["checkpoint", "epoch_2", "epoch_1"]
    assert [line[1:3] for line in lines[1:]] == [["2", "20"], ["1", "10"]]
    assert all(line[-1] == "complete" for line in lines[1:])


def test_ls_looks_into_the_folders_of_runs(stratagem: Command, run: Path) -> None:
    """Given the folder of all runs, it lists those of each."""
    assert "toy/epoch_1" in stratagem("ckpt", "ls", run.parent).out


def test_ls_names_what_cannot_be_used(stratagem: Command, run: Path) -> None:
    """A checkpoint without its manifest is listed with what is wrong."""
    (run / "epoch_2" / "manifest.json").unlink()
    assert "manifest.json is missing" in stratagem("ckpt", "ls", run).out


def test_ls_of_nothing_is_an_error(stratagem: Command, tmp_path: Path) -> None:
    """A folder without checkpoints exits with 2."""
    listed = stratagem("ckpt", "ls", tmp_path)
    assert (listed.status, listed.out) == (2, "")
    assert "there is no checkpoint in it" in listed.err


def test_show_tells_parts_and_position(stratagem: Command, run: Path) -> None:
    """`ckpt show` prints the meta without the configuration, and each part with its numbers."""
    shown = stratagem("ckpt", "show", run / "epoch_2").out
    rows = [line.split() for line in shown.splitlines()]
    assert ["iter", "20"] in rows
    assert ["state_dict", "1", "4", "16", "bytes"] in rows
    assert "lr = 0.1" not in shown


def test_show_prints_the_configuration(stratagem: Command, run: Path) -> None:
    """`ckpt show --config` prints it as it was kept."""
    assert stratagem("ckpt", "show", run / "epoch_1", "--config").out == "lr = 0.1\n\n"


def test_show_lists_tensors_with_their_range(stratagem: Command, run: Path) -> None:
    """`ckpt show --tensors` prints smallest and largest number, and counts those that are not finite."""
    save_checkpoint({"state_dict": {"x": torch.tensor([1.5, -2.0, float("inf")])}}, run / "odd")
    rows = [line.split() for line in stratagem("ckpt", "show", run / "odd", "--tensors").out.splitlines()]
    assert ["state_dict/x", "float32", "[3]", "-2", "1.5", "1"] in rows


def test_verify_reads_all_of_a_folder(stratagem: Command, run: Path) -> None:
    """Sound ones are named with their size, and the status is 0."""
    verified = stratagem("ckpt", "verify", run)
    assert verified.status == 0
    assert [line.split()[0] for line in verified.out.splitlines()] == ["sound", "sound"]


def test_verify_names_the_damaged_tensor(stratagem: Command, run: Path) -> None:
    """One flipped bit makes the status 1; the file and the tensor are named, and the others are still checked."""
    damage(run / "epoch_2")
    verified = stratagem("ckpt", "verify", run)
    assert verified.status == 1
    assert "model.safetensors: the tensor 'w' is not what was written" in verified.out
    assert "sound    " in verified.out
    assert "1 of 2 cannot be used" in verified.err


def test_diff_tells_where_and_how_much(stratagem: Command, run: Path) -> None:
    """`ckpt diff` prints each difference and exits with 1; of equal ones it says so and exits with 0."""
    different = stratagem("ckpt", "diff", run / "epoch_1", run / "epoch_2")
    assert different.status == 1
    assert "up to 1 in 100.0% of its numbers" in different.out
    assert "meta/iter" in different.out
    only = stratagem("ckpt", "diff", run / "epoch_1", run / "epoch_2", "--part", "average")
    assert (only.status, only.out) == (0, "They are equal.\n")


def test_diff_of_an_unknown_part_is_refused(stratagem: Command, run: Path) -> None:
    """A part that neither has is an error with the nearest name, not an empty answer."""
    refused = stratagem("ckpt", "diff", run / "epoch_1", run / "epoch_2", "--part", "state_dct")
    assert refused.status == 2
    assert "Did you mean 'state_dict'" in refused.err


def test_convert_says_what_was_left_out(stratagem: Command, run: Path, tmp_path: Path) -> None:
    """Weights alone go into safetensors, and the parts that do not are named."""
    converted = stratagem("ckpt", "convert", run / "epoch_1", tmp_path / "w.safetensors")
    assert converted.status == 0
    assert "left out: meta, average" in converted.out
    assert load_file(tmp_path / "w.safetensors")["w"].tolist() == [[1, 1], [1, 1]]


def test_consolidate_takes_the_average_where_asked(stratagem: Command, run: Path, tmp_path: Path) -> None:
    """`ckpt consolidate --averaged` writes the averaged weights."""
    assert stratagem("ckpt", "consolidate", run / "epoch_1", tmp_path / "a.safetensors", "--averaged").status == 0
    assert load_file(tmp_path / "a.safetensors")["w"].tolist() == [[0.25, 0.25], [0.25, 0.25]]


def test_consolidate_finds_the_average_of_a_real_run(stratagem: Command, config: str, tmp_path: Path) -> None:
    """What EMAHook puts into a checkpoint is what `--averaged` takes: they went by different names."""
    folder = tmp_path / "averaging"
    trained = stratagem(
        "train", config, "--work-dir", folder, "--set", "custom_hooks=[{'type': 'EMAHook', 'momentum': 0.5}]"
    )
    assert trained.status == 0, trained.err
    checkpoint = find_latest_checkpoint(folder)
    done = stratagem("ckpt", "consolidate", checkpoint, tmp_path / "a.safetensors", "--averaged")
    assert done.status == 0, done.err
    saved = read_any(checkpoint)
    written = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(written[name], value) for name, value in saved["average"]["averages"].items())
    assert any(not torch.equal(written[name], value) for name, value in saved["state_dict"].items())


def test_consolidate_without_an_average_is_refused(stratagem: Command, run: Path, tmp_path: Path) -> None:
    """Weights that are not averaged are never taken for averaged ones."""
    save_checkpoint({"state_dict": {"w": torch.ones(1)}}, run / "plain")
    refused = stratagem("ckpt", "consolidate", run / "plain", tmp_path / "a.safetensors", "--averaged")
    assert refused.status == 2
    assert "holds no averaged weights" in refused.err
    assert not (tmp_path / "a.safetensors").exists()


def keeping(folder: Path, epochs: int) -> None:
    """Save what a run would have, an epoch each, and one by hand."""
    for epoch in range(1, epochs + 1):
        purpose = {"series": "epoch_{}", "number": epoch}
        meta = {"epoch": epoch, "iter": epoch, "run_id": "a", "purpose": purpose}
        save_checkpoint({"state_dict": {"w": torch.ones(1)}, "meta": meta}, folder / f"epoch_{epoch}")
    save_checkpoint({"state_dict": {"w": torch.ones(1)}, "meta": {"iter": 1}}, folder / "mine")


def left_in(folder: Path) -> set[str]:
    """Return the names that can be seen in a folder."""
    return {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}


def test_prune_keeps_the_last_and_what_no_run_saved(stratagem: Command, tmp_path: Path) -> None:
    """`ckpt prune --keep-last 2 --keep-every 2` removes the rest, names it, and leaves what was saved by hand."""
    keeping(tmp_path / "run", 5)
    pruned = stratagem("ckpt", "prune", tmp_path / "run", "--keep-last", 2, "--keep-every", 2, "--yes")
    assert pruned.status == 0
    assert left_in(tmp_path / "run") == {"epoch_2", "epoch_4", "epoch_5", "mine"}
    assert "Removed 2." in pruned.out


def test_prune_says_first_and_asks(stratagem: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--dry-run removes nothing, and without --yes a no is a no."""
    keeping(tmp_path / "run", 3)
    tried = stratagem("ckpt", "prune", tmp_path / "run", "--keep-last", 1, "--dry-run")
    assert "2 would be removed" in tried.out
    monkeypatch.setattr("typer.confirm", lambda _: False)
    stratagem("ckpt", "prune", tmp_path / "run", "--keep-last", 1)
    assert left_in(tmp_path / "run") == {"epoch_1", "epoch_2", "epoch_3", "mine"}


def test_prune_does_not_count_a_damaged_checkpoint(stratagem: Command, tmp_path: Path) -> None:
    """The last sound one stays when a newer one is damaged."""
    keeping(tmp_path / "run", 3)
    damage(tmp_path / "run" / "epoch_3")
    pruned = stratagem("ckpt", "prune", tmp_path / "run", "--keep-last", 1, "--yes")
    assert "epoch_3 is damaged and does not count" in pruned.err
    assert left_in(tmp_path / "run") == {"epoch_2", "epoch_3", "mine"}


def test_prune_where_no_run_saved_is_an_error(stratagem: Command, tmp_path: Path) -> None:
    """A folder without a run's checkpoints exits with 2."""
    assert "no run has saved a checkpoint" in stratagem("ckpt", "prune", tmp_path, "--keep-last", 1).err
