"""Commands that inspect checkpoints."""

from __future__ import annotations

import json
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


def test_ls_lists_the_newest_first(stratagem: Command, run: Path) -> None:
    """`ckpt ls` lists each checkpoint with its epoch, iteration and state, newest first."""
    listed = stratagem("ckpt", "ls", run)
    lines = [line.split() for line in listed.out.splitlines()]
    assert [line[0] for line in lines] == ["checkpoint", "epoch_2", "epoch_1"]
    assert [line[1:3] for line in lines[1:]] == [["2", "20"], ["1", "10"]]
    assert all(line[-1] == "complete" for line in lines[1:])


@pytest.mark.slow
def test_ls_searches_the_folders_of_runs(stratagem: Command, run: Path) -> None:
    """`ckpt ls` on a folder of several runs lists the checkpoints of each run."""
    assert "toy/epoch_1" in stratagem("ckpt", "ls", run.parent).out


@pytest.mark.slow
def test_ls_lists_unusable_checkpoints(stratagem: Command, run: Path) -> None:
    """A checkpoint without a manifest is listed with the problem."""
    (run / "epoch_2" / "manifest.json").unlink()
    assert "manifest.json is missing" in stratagem("ckpt", "ls", run).out


def test_ls_of_an_empty_folder_is_an_error(stratagem: Command, tmp_path: Path) -> None:
    """`ckpt ls` on a folder without checkpoints exits with 2."""
    listed = stratagem("ckpt", "ls", tmp_path)
    assert (listed.status, listed.out) == (2, "")
    assert "No checkpoint found in" in listed.err


@pytest.mark.slow
def test_show_prints_parts_and_position(stratagem: Command, run: Path) -> None:
    """`ckpt show` prints the meta without the configuration, and the size of each part."""
    shown = stratagem("ckpt", "show", run / "epoch_2").out
    rows = [line.split() for line in shown.splitlines()]
    assert ["iter", "20"] in rows
    assert ["state_dict", "1", "4", "16", "bytes"] in rows
    assert "lr = 0.1" not in shown


def test_show_prints_the_configuration(stratagem: Command, run: Path) -> None:
    """`ckpt show --config` prints the saved configuration."""
    assert stratagem("ckpt", "show", run / "epoch_1", "--config").out == "lr = 0.1\n\n"


@pytest.mark.slow
def test_show_lists_tensors_with_their_range(stratagem: Command, run: Path) -> None:
    """`ckpt show --tensors` prints the minimum and maximum, and counts NaN and Inf."""
    save_checkpoint({"state_dict": {"x": torch.tensor([1.5, -2.0, float("inf")])}}, run / "odd")
    rows = [line.split() for line in stratagem("ckpt", "show", run / "odd", "--tensors").out.splitlines()]
    assert ["state_dict/x", "float32", "[3]", "-2", "1.5", "1"] in rows


@pytest.mark.slow
def test_show_and_diff_print_json(stratagem: Command, run: Path) -> None:
    """``--json`` prints the same information for other programs, also if there are no differences."""
    shown = json.loads(stratagem("ckpt", "show", run / "epoch_2", "--tensors", "--json").out)
    assert shown["meta"]["epoch"] == "2"
    assert "state_dict" in [row["part"] for row in shown["parts"]]
    assert {"tensor", "dtype", "shape", "min", "max", "NaN or Inf"} == shown["tensors"][0].keys()
    same = stratagem("ckpt", "diff", run / "epoch_2", run / "epoch_2", "--json")
    assert (same.status, json.loads(same.out)) == (0, [])
    different = stratagem("ckpt", "diff", run / "epoch_1", run / "epoch_2", "--part", "state_dict", "--json")
    assert different.status == 1
    assert {"where", "first", "second", "difference"} == json.loads(different.out)[0].keys()


@pytest.mark.slow
def test_verify_checks_all_checkpoints_in_a_folder(stratagem: Command, run: Path) -> None:
    """`ckpt verify` lists intact checkpoints with their size and exits with 0."""
    verified = stratagem("ckpt", "verify", run)
    assert verified.status == 0
    assert [line.split()[0] for line in verified.out.splitlines()] == ["ok", "ok"]


@pytest.mark.slow
def test_verify_names_the_damaged_tensor(stratagem: Command, run: Path) -> None:
    """A flipped bit makes `ckpt verify` exit with 1 and name the file and tensor; the others are still checked."""
    damage(run / "epoch_2")
    verified = stratagem("ckpt", "verify", run)
    assert verified.status == 1
    assert "model.safetensors: the tensor 'w' is corrupted" in verified.out
    assert "ok       " in verified.out
    assert "1 of 2 checkpoints are damaged" in verified.err


@pytest.mark.slow
def test_diff_prints_differences(stratagem: Command, run: Path) -> None:
    """`ckpt diff` prints each difference and exits with 1; without differences it exits with 0."""
    different = stratagem("ckpt", "diff", run / "epoch_1", run / "epoch_2")
    assert different.status == 1
    assert "up to 1 in 100.0% of the elements" in different.out
    assert "meta/iter" in different.out
    only = stratagem("ckpt", "diff", run / "epoch_1", run / "epoch_2", "--part", "average")
    assert (only.status, only.out) == (0, "No differences.\n")


def test_diff_of_an_unknown_part_is_rejected(stratagem: Command, run: Path) -> None:
    """A part that neither checkpoint has raises an error with the closest name."""
    rejected = stratagem("ckpt", "diff", run / "epoch_1", run / "epoch_2", "--part", "state_dct")
    assert rejected.status == 2
    assert "Did you mean 'state_dict'" in rejected.err


def test_convert_lists_omitted_parts(stratagem: Command, run: Path, tmp_path: Path) -> None:
    """Converting to safetensors keeps the weights only and lists the omitted parts."""
    converted = stratagem("ckpt", "convert", run / "epoch_1", tmp_path / "w.safetensors")
    assert converted.status == 0
    assert "left out: meta, average" in converted.out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["convert", "consolidate"])
def test_exported_weights_are_those_that_the_run_evaluated(
    stratagem: Command, run: Path, tmp_path: Path, command: str
) -> None:
    """If a run averaged its weights, the averaged ones are exported; `--raw` exports the trained ones."""
    exported = stratagem("ckpt", command, run / "epoch_1", tmp_path / "a.safetensors")
    assert "Use --raw to write the trained weights" in exported.out
    assert load_file(tmp_path / "a.safetensors")["w"].tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert stratagem("ckpt", command, run / "epoch_1", tmp_path / "raw.safetensors", "--raw").status == 0
    assert load_file(tmp_path / "raw.safetensors")["w"].tolist() == [[1, 1], [1, 1]]


@pytest.mark.slow
def test_contradicting_options_for_the_exported_weights_are_rejected(
    stratagem: Command, run: Path, tmp_path: Path
) -> None:
    """`--raw` applies to formats that contain only weights, and excludes `--averaged`."""
    both = stratagem("ckpt", "consolidate", run / "epoch_1", tmp_path / "a.safetensors", "--averaged", "--raw")
    assert "--averaged and --raw are mutually exclusive" in both.err
    whole = stratagem("ckpt", "convert", run / "epoch_1", tmp_path / "a.pth", "--raw")
    assert "The format 'pth' contains the trained weights" in whole.err
    assert list(tmp_path.glob("a.*")) == []


@pytest.mark.slow
def test_consolidate_finds_the_average_of_a_run(stratagem: Command, config: str, tmp_path: Path) -> None:
    """`ckpt consolidate --averaged` finds the averages that EMAHook saves; their names used to differ."""
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


@pytest.mark.slow
def test_consolidate_without_an_average_is_rejected(stratagem: Command, run: Path, tmp_path: Path) -> None:
    """Without averages, `--averaged` raises an error and writes nothing."""
    save_checkpoint({"state_dict": {"w": torch.ones(1)}}, run / "plain")
    rejected = stratagem("ckpt", "consolidate", run / "plain", tmp_path / "a.safetensors", "--averaged")
    assert rejected.status == 2
    assert "has no averaged weights" in rejected.err
    assert not (tmp_path / "a.safetensors").exists()


def save_run(folder: Path, epochs: int) -> None:
    """Save one checkpoint per epoch like a run, and one by hand."""
    for epoch in range(1, epochs + 1):
        purpose = {"series": "epoch_{}", "number": epoch}
        meta = {"epoch": epoch, "iter": epoch, "run_id": "a", "purpose": purpose}
        save_checkpoint({"state_dict": {"w": torch.ones(1)}, "meta": meta}, folder / f"epoch_{epoch}")
    save_checkpoint({"state_dict": {"w": torch.ones(1)}, "meta": {"iter": 1}}, folder / "mine")


def entries_of(folder: Path) -> set[str]:
    """Return the visible names in a folder."""
    return {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}


@pytest.mark.slow
def test_prune_keeps_the_last_and_manual_checkpoints(stratagem: Command, tmp_path: Path) -> None:
    """`ckpt prune` removes the other checkpoints of the run, lists them, and keeps those saved by hand."""
    save_run(tmp_path / "run", 5)
    pruned = stratagem("ckpt", "prune", tmp_path / "run", "--keep-last", 2, "--keep-every", 2, "--yes")
    assert pruned.status == 0
    assert entries_of(tmp_path / "run") == {"epoch_2", "epoch_4", "epoch_5", "mine"}
    assert "Removed 2 checkpoints." in pruned.out


@pytest.mark.slow
def test_prune_asks_for_confirmation(stratagem: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--dry-run removes nothing, and without --yes the command asks for confirmation."""
    save_run(tmp_path / "run", 3)
    tried = stratagem("ckpt", "prune", tmp_path / "run", "--keep-last", 1, "--dry-run")
    assert "Would remove 2 checkpoints" in tried.out
    monkeypatch.setattr("typer.confirm", lambda _: False)
    stratagem("ckpt", "prune", tmp_path / "run", "--keep-last", 1)
    assert entries_of(tmp_path / "run") == {"epoch_1", "epoch_2", "epoch_3", "mine"}


@pytest.mark.slow
def test_prune_does_not_count_a_damaged_checkpoint(stratagem: Command, tmp_path: Path) -> None:
    """A damaged checkpoint does not count as one of the last, so the last intact one is kept."""
    save_run(tmp_path / "run", 3)
    damage(tmp_path / "run" / "epoch_3")
    pruned = stratagem("ckpt", "prune", tmp_path / "run", "--keep-last", 1, "--yes")
    assert "epoch_3 is damaged and does not count" in pruned.err
    assert entries_of(tmp_path / "run") == {"epoch_2", "epoch_3", "mine"}


def test_prune_of_an_empty_folder_is_an_error(stratagem: Command, tmp_path: Path) -> None:
    """`ckpt prune` on a folder without checkpoints of a run exits with 2."""
    assert "No checkpoint of a run found in" in stratagem("ckpt", "prune", tmp_path, "--keep-last", 1).err
