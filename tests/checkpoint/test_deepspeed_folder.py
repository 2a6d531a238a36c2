"""DeepSpeed folders are read without DeepSpeed; partitions of ranks become parameters and state by name."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.checkpoint import list_checkpoints, read_any
from stratagem.checkpoint.foreign import is_deepspeed_folder
from stratagem.errors import CheckpointNotFoundError

# Two parameters with 3 and 4 elements and one padding element: 4 elements on each of two ranks.
FLAT = torch.arange(8.0)
SHAPES = [OrderedDict(a=torch.Size([3]), b=torch.Size([2, 2]))]


def save(folder: Path, optim: list[dict[str, Any]], *, stage3: bool = False, **added: Any) -> Path:
    """Write a folder as DeepSpeed does, with a partition for each rank and the client state."""
    tag = folder / "global_step5"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step5")
    module = OrderedDict(a=torch.zeros(3), b=torch.zeros(2, 2), seen=torch.tensor(7))
    model = {
        "module": module,
        "buffer_names": ["seen"],
        "param_shapes": SHAPES,
        "dp_world_size": len(optim),
        "global_steps": 5,
        "skipped_steps": 2,
        "ds_config": {"gradient_accumulation_steps": 3},
        **added,
    }
    for rank, state in enumerate(optim):
        torch.save({"optimizer_state_dict": state}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage3:
            torch.save(model, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if not stage3:
        torch.save(model, tag / "mp_rank_00_model_states.pt")
    return folder


def base(moment: torch.Tensor) -> dict[str, Any]:
    """Return the state dict of torch's optimizer for one flat tensor."""
    slots = {"step": torch.tensor(3.0), "exp_avg": moment}
    return {"state": {0: slots}, "param_groups": [{"lr": 0.5, "fused": True, "params": [0]}]}


def flat_partitions() -> list[dict[str, Any]]:
    """Return the partitions of stage 2; only the master weights of the last one lack the padding."""
    return [
        {"single_partition_of_fp32_groups": [FLAT[:4]], "base_optimizer_state": base(FLAT[:4] * 10)},
        {"single_partition_of_fp32_groups": [FLAT[4:7]], "base_optimizer_state": base(FLAT[4:] * 10)},
    ]


def test_partitions_of_stages_1_and_2_are_gathered(tmp_path: Path) -> None:
    """Float32 master weights, moments, options and counters are restored by name; buffers come from the model states."""
    tree = read_any(save(tmp_path / "saved", flat_partitions()))
    assert tree["state_dict"]["a"].tolist() == [0, 1, 2]
    assert tree["state_dict"]["b"].tolist() == [[3, 4], [5, 6]]
    assert tree["state_dict"]["seen"].item() == 7
    optimizer = tree["optimizer"]
    assert optimizer["state"]["b"]["exp_avg"].tolist() == [[30, 40], [50, 60]]
    assert optimizer["state"]["a"]["step"].item() == 3
    assert optimizer["param_groups"] == [{"lr": 0.5, "params": ["a", "b"]}]
    assert optimizer["counts"] == {"inner_count": 15, "attempts": 5, "updates": 3, "pending": 0}


def test_partitions_of_stage_3_are_gathered(tmp_path: Path) -> None:
    """Each parameter is split into equal parts: of three elements, each rank has two, one of them padding."""
    first, second = torch.tensor([0.0, 1, 3, 4]), torch.tensor([2.0, -1, 5, 6])
    parts = [{"fp32_flat_groups": [part], "optimizer_state_dict": base(part * 10)} for part in (first, second)]
    tree = read_any(save(tmp_path / "saved", parts, stage3=True))
    assert tree["state_dict"]["a"].tolist() == [0, 1, 2]
    assert tree["state_dict"]["b"].tolist() == [[3, 4], [5, 6]]
    assert tree["optimizer"]["state"]["a"]["exp_avg"].tolist() == [0, 10, 20]


def test_a_missing_rank_file_is_an_error(tmp_path: Path) -> None:
    """A missing file of a rank raises an error."""
    folder = save(tmp_path / "saved", flat_partitions())
    (folder / "global_step5" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointNotFoundError, match="it was saved by 2 ranks, but contains the files of 1 ranks"):
        read_any(folder)


def test_latest_cannot_lead_outside_the_folder(tmp_path: Path) -> None:
    """``latest`` may name a subfolder; other paths in it are not followed."""
    save(tmp_path / "saved", flat_partitions())
    other = tmp_path / "other"
    other.mkdir()
    (other / "latest").write_text("../saved/global_step5")
    assert not is_deepspeed_folder(other)
    assert is_deepspeed_folder(tmp_path / "saved")
    assert is_deepspeed_folder(tmp_path / "saved" / "global_step5")


@pytest.mark.parametrize("stage3", [False, True])
def test_a_folder_that_a_run_saved_is_found_under_any_name(tmp_path: Path, *, stage3: bool) -> None:
    """The client state of DeepSpeedStrategy identifies the folders of a run and their order."""
    for name, session in (("e=1", 2), ("e=2", 1)):
        meta = {"run_id": "a", "iter": 5, "save_order": {"session": session, "save": 1}}
        save(tmp_path / name, flat_partitions(), stage3=stage3, stratagem={"meta": meta, "hooks": {}})
    save(tmp_path / "theirs", flat_partitions(), stage3=stage3)
    assert [each.path.name for each in list_checkpoints(tmp_path)] == ["e=1", "e=2"]
    # The inner folder is the same checkpoint.
    assert list_checkpoints(tmp_path / "e=1") == []
