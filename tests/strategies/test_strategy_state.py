"""State of the model, optimizer and schedulers: reading, loading, saving and resuming."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from stratagem.checkpoint import CheckpointLoader, save_checkpoint
from stratagem.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigTypeError,
    StratagemError,
)
from stratagem.model import BaseModel
from stratagem.optim import OptimWrapper
from stratagem.strategies import BaseStrategy
from tests.support.ranks import Ranks
from tests.support.small_runs import Line, Lines, Mlp, batch, digest, make, train

Make = Callable[..., BaseStrategy]

ADAMW = {"optimizer": {"type": "AdamW", "lr": 0.05}}
SCHEDULE = [
    {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 4},
    {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 4, "end": 12},
]
FORMS = pytest.mark.parametrize("name", ["saved", "saved.pth"])


def ready(make_single: Make, **kwargs: Any) -> BaseStrategy:
    """Return a strategy that trains an Mlp with AdamW and two schedules."""
    strategy = make_single(**kwargs)
    strategy.prepare(Mlp(), optim_wrapper=ADAMW, param_scheduler=SCHEDULE)
    return strategy


def several() -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with two optimizers, the second of which has two groups."""
    model = Mlp()
    first, _, second = model.layers
    groups = [{"params": [second.weight], "lr": 0.2}, {"params": [second.bias]}]
    return model, {"a": OptimWrapper(SGD(first.parameters(), lr=0.1)), "b": OptimWrapper(SGD(groups, lr=0.3))}


# ---- state dicts ---------------------------------------------------------------------------------------------------


def test_the_model_state_is_on_the_cpu(single: Make) -> None:
    """The model's state is on the CPU, detached, and has the names of the unwrapped model."""
    strategy = ready(single)
    state = strategy.model_state_dict()
    assert list(state) == ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"]
    assert all(value.device.type == "cpu" and not value.requires_grad for value in state.values())


def test_without_an_optimizer_its_state_is_a_type_error(single: Make) -> None:
    """The error for a missing optimizer contains the required call."""
    strategy = single()
    strategy.prepare(Mlp())
    with pytest.raises(ConfigTypeError, match=r"Call prepare\(model, optim_wrapper=...\)") as caught:
        strategy.optim_state_dict()
    assert isinstance(caught.value, TypeError)


def test_optimizer_and_scheduler_state_can_be_loaded(single: Make) -> None:
    """A strategy that loads all three states continues like the first one."""
    one = ready(single)
    train(one, [batch()] * 3)
    states = [
        copy.deepcopy(state) for state in (one.model_state_dict(), one.optim_state_dict(), one.scheduler_state_dict())
    ]
    other = ready(single)
    other.load_model_state_dict(states[0], strict=True)
    other.load_optim_state_dict(states[1])
    other.load_scheduler_state_dict(states[2])
    assert other.optim_wrapper.get_lr() == one.optim_wrapper.get_lr()
    assert train(other, [batch()] * 4) == train(one, [batch()] * 4)
    assert digest(other.model) == digest(one.model)


def test_several_optimizers_have_state_by_name(single: Make) -> None:
    """With several optimizers, the states of optimizers and schedulers are mappings by name."""
    strategy = single()
    model, optim = several()
    strategy.prepare(model, optim_wrapper=optim, param_scheduler=SCHEDULE)
    assert list(strategy.optim_state_dict()) == ["a", "b"]
    states = strategy.scheduler_state_dict()
    assert {name: len(some) for name, some in states.items()} == {"a": 2, "b": 2}
    strategy.param_schedulers["b"][0].step(2)
    moved = strategy.scheduler_state_dict()
    strategy.load_scheduler_state_dict(states)
    assert strategy.scheduler_state_dict() == states != moved


@pytest.mark.parametrize(
    ("kind", "states", "message"),
    [
        ("one", [{}], "has 1 schedulers, but this run has 2"),
        ("one", {"a": []}, r"belong to several optimizer"),
        ("several", [{}], "belong to one optimizer"),
        ("several", {"a": [], "c": []}, r"schedulers for \['a', 'c'\], but this run has schedulers for \['a', 'b'\]"),
        ("several", {"a": [{}], "b": [{}, {}]}, "has 1 schedulers, but this run has 2"),
    ],
)
def test_a_different_number_of_schedulers_is_rejected(single: Make, kind: str, states: Any, message: str) -> None:
    """A different number of schedulers raises an error."""
    strategy = single()
    model, optim = several() if kind == "several" else (Mlp(), ADAMW)
    strategy.prepare(model, optim_wrapper=optim, param_scheduler=SCHEDULE)
    with pytest.raises(CheckpointMismatchError, match=message):
        strategy.load_scheduler_state_dict(states)


# ---- loading weights -----------------------------------------------------------------------------------------------


def test_mismatched_keys_are_reported_once_and_the_rest_is_loaded(single: Make) -> None:
    """All missing, unexpected and mismatched keys are in one warning; with ``strict``, they raise an error."""
    strategy = ready(single)
    lines = Lines(strategy)
    state = {
        "layers.0.weight": torch.ones(8, 4),
        "layers.2.weight": torch.ones(5, 8),
        "layers.2.bias": torch.ones(3),
        "head.bias": torch.ones(2),
    }
    before = digest(strategy.model)
    with pytest.raises(CheckpointMismatchError, match=r"head\.bias"):
        strategy.load_model_state_dict(state, strict=True)
    assert digest(strategy.model) == before
    strategy.load_model_state_dict(state)
    assert strategy.model.layers[0].weight.eq(1).all()
    assert strategy.model.layers[2].bias.eq(1).all()
    (line,) = lines.lines
    assert line.startswith("WARNING")
    for part in (
        "1 missing",
        "layers.0.bias",
        "1 unexpected",
        "head.bias",
        "layers.2.weight (saved [5, 8], model [3, 8])",
    ):
        assert part in line


def test_a_complete_match_is_not_logged(single: Make) -> None:
    """If all keys match, nothing is logged."""
    strategy = ready(single)
    lines = Lines(strategy)
    assert strategy.load_model_state_dict(strategy.model_state_dict()).exact
    assert lines.lines == []


def test_a_checkpoint_without_matching_keys_is_rejected(single: Make, tmp_path: Path) -> None:
    """A checkpoint without any matching key raises an error, even without ``strict``."""
    save_checkpoint({"state_dict": {"backbone.weight": torch.ones(1)}}, tmp_path / "other.pth")
    strategy = ready(single)
    with pytest.raises(CheckpointMismatchError, match="No key of the checkpoint matches the model"):
        strategy.load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_removed(single: Make, tmp_path: Path, prefix: str) -> None:
    """Checkpoints with the prefixes of DDP and of compiled models can be loaded."""
    strategy = ready(single)
    wanted = {name: torch.full_like(value, 0.5) for name, value in strategy.model_state_dict().items()}
    save_checkpoint({"state_dict": {prefix + name: value for name, value in wanted.items()}}, tmp_path / "a.pth")
    strategy.load_checkpoint(tmp_path / "a.pth", strict=True)
    assert all(value.eq(0.5).all() for value in strategy.model_state_dict().values())


class Listed(BaseModel):
    """A model whose parameter names start with the letters of a wrapper's prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.modules_list = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x: Any, mode: str = "tensor") -> Any:
        return self.modules_list[0](x)


def test_a_parameter_named_modules_list_is_not_changed(single: Make) -> None:
    """The default patterns of ``revise_keys`` match a literal dot."""
    strategy = single()
    strategy.prepare(Listed())
    state = {"modules_list.0.weight": torch.ones(2, 2), "modules_list.0.bias": torch.ones(2)}
    assert strategy.load_model_state_dict(state).exact
    assert strategy.model.modules_list[0].weight.eq(1).all()


def test_keys_can_be_revised(single: Make, tmp_path: Path) -> None:
    """``revise_keys`` are (pattern, replacement) pairs that are applied in order."""
    strategy = ready(single)
    state = {name.replace("layers", "net.body"): value for name, value in strategy.model_state_dict().items()}
    save_checkpoint({"state_dict": state}, tmp_path / "a.pth")
    strategy.load_checkpoint(tmp_path / "a.pth", strict=True, revise_keys=[(r"^net\.", ""), (r"^body", "layers")])


def test_loading_a_checkpoint_only_loads_weights(single: Make, tmp_path: Path) -> None:
    """``load_checkpoint`` only loads weights, after the callback, and returns the other parts."""
    one = ready(single)
    train(one, [batch()] * 3)
    one.save_checkpoint(tmp_path / "a", extra_ckpt={"meta": {"epoch": 2}, "note": [1, 2]})
    other = ready(single, seed=1)
    rates = other.optim_wrapper.get_lr()

    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["layers.2.bias"] = torch.zeros(3)

    rest = other.load_checkpoint(tmp_path / "a", callback=change)
    assert torch.equal(other.model.layers[0].weight, one.model.layers[0].weight)
    assert other.model.layers[2].bias.eq(0).all()
    assert other.optim_wrapper.get_lr() == rates
    assert other.optim_state_dict()["state"] == {}
    assert (rest["meta"]["epoch"], rest["note"], "state_dict" in rest) == (2, [1, 2], False)


@pytest.mark.parametrize("name", ["nothing", "nothing.pth"])
def test_a_missing_checkpoint_is_reported(single: Make, tmp_path: Path, name: str) -> None:
    """A missing checkpoint raises a FileNotFoundError."""
    strategy = ready(single)
    for act in (strategy.load_checkpoint, strategy.resume):
        with pytest.raises(CheckpointNotFoundError, match=name):
            act(tmp_path / name)


def test_map_location_sets_the_device(single: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, ``load_checkpoint`` reads to the CPU and ``resume`` to the device of the strategy."""
    strategy = ready(single)
    strategy.save_checkpoint(tmp_path / "a")
    places: list[str] = []
    read = CheckpointLoader.load_checkpoint

    def spy(filename: Any, map_location: Any, **_: Any) -> Any:
        places.append(str(map_location))
        return read(filename, "cpu")

    monkeypatch.setattr(CheckpointLoader, "load_checkpoint", spy)
    strategy.load_checkpoint(tmp_path / "a")
    strategy.load_checkpoint(tmp_path / "a", map_location="meta")
    strategy.resume(tmp_path / "a")
    strategy.resume(tmp_path / "a", map_location="meta")
    assert places == ["cpu", "meta", str(strategy.world.device), "meta"]


# ---- saving and resuming -------------------------------------------------------------------------------------------


@FORMS
def test_a_resumed_run_continues_exactly(single: Make, tmp_path: Path, name: str) -> None:
    """Weights, optimizer state, learning rates, schedules and generators are restored exactly."""
    one = ready(single, seed=3)
    train(one, [batch()] * 5)
    one.save_checkpoint(tmp_path / name)
    expected = (
        [random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()],
        one.optim_wrapper.get_lr(),
        one.scheduler_state_dict(),
        train(one, [batch()] * 6),
        digest(one.model),
    )
    other = ready(single, seed=3)
    np.random.randn()
    other.resume(tmp_path / name)
    assert expected == (
        [random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()],
        other.optim_wrapper.get_lr(),
        other.scheduler_state_dict(),
        train(other, [batch()] * 6),
        digest(other.model),
    )


@FORMS
def test_several_optimizers_are_resumed_by_name(single: Make, tmp_path: Path, name: str) -> None:
    """The state and learning rates of several optimizers are restored by name."""
    strategy = single()
    model, optim = several()
    strategy.prepare(model, optim_wrapper=optim)
    strategy.optim_wrapper["b"].param_groups[0]["lr"] = 0.77
    strategy.save_checkpoint(tmp_path / name)
    other = single()
    model, optim = several()
    other.prepare(model, optim_wrapper=optim)
    other.resume(tmp_path / name)
    assert other.optim_wrapper.get_lr() == {"a.lr": [0.1], "b.lr": [0.77, 0.3]}


@FORMS
def test_a_checkpoint_has_the_common_keys(single: Make, tmp_path: Path, name: str) -> None:
    """Checkpoints have the common keys, meta contains seed, time and version, and extra_ckpt is merged."""
    strategy = ready(single, seed=4)
    extra = {"meta": {"epoch": 1, "iter": 7, "seed": "mine"}, "message_hub": {"best": 0.5}}
    strategy.save_checkpoint(tmp_path / name, extra_ckpt=extra)
    assert extra == {"meta": {"epoch": 1, "iter": 7, "seed": "mine"}, "message_hub": {"best": 0.5}}
    checkpoint = CheckpointLoader.load_checkpoint(tmp_path / name)
    assert {"state_dict", "optimizer", "param_schedulers", "meta", "message_hub"} <= set(checkpoint)
    meta = checkpoint["meta"]
    assert (meta["epoch"], meta["iter"], meta["seed"], checkpoint["message_hub"]) == (1, 7, 4, {"best": 0.5})
    assert {"time", "stratagem", "world_size"} <= set(meta)
    if name.endswith(".pth"):
        assert set(torch.load(tmp_path / name, weights_only=True)) == set(checkpoint)


def test_parts_can_be_omitted_and_the_callback_runs_last(single: Make, tmp_path: Path) -> None:
    """Parts can be omitted, and the callback receives the final checkpoint and may change it."""
    strategy = ready(single)
    seen: list[set[str]] = []

    def change(checkpoint: dict[str, Any]) -> None:
        seen.append(set(checkpoint))
        checkpoint["meta"]["note"] = "from the callback"

    strategy.save_checkpoint(tmp_path / "a", save_optimizer=False, save_param_scheduler=False, callback=change)
    assert seen == [{"state_dict", "generators", "meta"}]
    checkpoint = CheckpointLoader.load_checkpoint(tmp_path / "a")
    assert checkpoint["meta"]["note"] == "from the callback"
    assert {"optimizer", "param_schedulers"}.isdisjoint(checkpoint)


def test_resuming_calls_the_callback_and_returns_the_rest(single: Make, tmp_path: Path) -> None:
    """The callback runs first and may change the checkpoint; ``resume`` returns the parts that it does not restore."""
    strategy = ready(single)
    strategy.save_checkpoint(tmp_path / "a", extra_ckpt={"note": 1})

    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["layers.2.bias"] = torch.full((3,), 9.0)

    rest = strategy.resume(tmp_path / "a", callback=change)
    assert set(rest) == {"meta", "note"}
    assert strategy.model.layers[2].bias.tolist() == [9.0, 9.0, 9.0]


@pytest.mark.parametrize("part", ["optimizer", "param_scheduler"])
def test_a_checkpoint_with_a_missing_part_is_rejected(single: Make, tmp_path: Path, part: str) -> None:
    """The error for a missing part contains the option to resume without it, which leaves that part unchanged."""
    strategy = ready(single)
    rates = strategy.optim_wrapper.get_lr()
    strategy.save_checkpoint(tmp_path / "a", **{f"save_{part}": False})
    train(strategy, [batch()] * 3)
    with pytest.raises(CheckpointMismatchError, match=f"resume_{part}=False"):
        strategy.resume(tmp_path / "a")
    moved = strategy.optim_wrapper.get_lr()
    strategy.resume(tmp_path / "a", resume_optimizer=False, resume_param_scheduler=False)
    assert strategy.optim_wrapper.get_lr() == moved != rates


def test_a_different_model_cannot_be_resumed(single: Make, tmp_path: Path) -> None:
    """Resuming is strict, because the optimizer state would not match a different model."""
    ready(single).save_checkpoint(tmp_path / "a")
    strategy = single()
    strategy.prepare(Line(), optim_wrapper=ADAMW)
    with pytest.raises(CheckpointMismatchError):
        strategy.resume(tmp_path / "a")


def test_different_parameter_groups_or_optimizers_are_rejected(single: Make, tmp_path: Path) -> None:
    """A different number of parameter groups or optimizers raises an error."""
    ready(single).save_checkpoint(tmp_path / "one")
    strategy = single()
    model, optim = several()
    strategy.prepare(model, optim_wrapper=optim)
    with pytest.raises(CheckpointMismatchError, match=r"this run has \['a', 'b'\]"):
        strategy.resume(tmp_path / "one")
    strategy.save_checkpoint(tmp_path / "several")
    with pytest.raises(CheckpointMismatchError, match=r"belongs to several optimizers \("):
        ready(single).resume(tmp_path / "several", resume_param_scheduler=False)
    grouped = single()
    grouped.prepare(Mlp(), optim_wrapper={**ADAMW, "paramwise_cfg": {"bias_lr_mult": 2.0}})
    with pytest.raises(CheckpointMismatchError, match="1 parameter groups, but this run's has 2"):
        grouped.resume(tmp_path / "one")


def test_different_schedulers_cannot_be_resumed(single: Make, tmp_path: Path) -> None:
    """Resuming with a different number of schedulers raises an error."""
    ready(single).save_checkpoint(tmp_path / "a")
    strategy = single()
    strategy.prepare(Mlp(), optim_wrapper=ADAMW, param_scheduler=SCHEDULE[:1])
    with pytest.raises(CheckpointMismatchError, match="has 2 schedulers, but this run has 1"):
        strategy.resume(tmp_path / "a")


def test_a_different_seed_causes_a_warning(single: Make, tmp_path: Path) -> None:
    """The seed of the checkpoint is used, with a warning if the configuration has a different one."""
    ready(single, seed=3).save_checkpoint(tmp_path / "a")
    given, drawn = ready(single, seed=4), ready(single, seed=None)
    lines = [Lines(given), Lines(drawn)]
    for strategy in (given, drawn):
        strategy.resume(tmp_path / "a")
        assert (strategy.seed, strategy.randomness["seed"]) == (3, 3)
    assert "WARNING The checkpoint was saved with seed 3, but this run was started with seed 4." in lines[0].text
    assert "WARNING" not in lines[1].text


def test_a_different_batch_size_is_logged(single: Make, tmp_path: Path) -> None:
    """The log explains the effect of a different batch size."""
    for size, log in (
        (8, None),
        (4, "with micro-batches of 8 samples per rank, but this run uses 4"),
    ):
        strategy = single()
        strategy.prepare(Mlp(), dispatch_kwargs={"train_micro_batch_size_per_gpu": size})
        if log is None:
            strategy.save_checkpoint(tmp_path / "a")
        else:
            lines = Lines(strategy)
            strategy.resume(tmp_path / "a")
            assert log in lines.text


@pytest.mark.parametrize("meta", [{}, {"iter": 2}])
def test_windows_go_on_where_they_were(single: Make, tmp_path: Path, meta: dict[str, int]) -> None:
    """Saved after 2 of 5 micro-batches in windows of two, the next updates are after the 4th and the 5th.

    The position is part of the optimizer state; ``meta`` is not required.
    """
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": 2}
    one = single()
    one.prepare(Line(), optim_wrapper=optim, dispatch_kwargs={"max_iters": 5})
    train(one, [torch.ones(1)] * 2)
    one.save_checkpoint(tmp_path / "a", extra_ckpt={"meta": meta})
    other = single()
    other.prepare(Line(), optim_wrapper=optim, dispatch_kwargs={"max_iters": 5})
    other.resume(tmp_path / "a")
    weights = []
    for _ in range(3):
        train(other, [torch.ones(1)])
        weights.append(round(other.model.weight.item(), 5))
    assert weights == [1.9, 1.8, 1.7]


@FORMS
def test_a_failed_save_keeps_the_old_checkpoint(single: Make, tmp_path: Path, name: str) -> None:
    """A failed save keeps the older checkpoint of that name intact and leaves no other files."""
    strategy = ready(single)
    strategy.save_checkpoint(tmp_path / "runs" / name)
    with pytest.raises(CheckpointError, match="object"):
        strategy.save_checkpoint(tmp_path / "runs" / name, extra_ckpt={"bad": object()})
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [name]
    strategy.resume(tmp_path / "runs" / name)


def test_a_truncated_checkpoint_is_rejected(single: Make, tmp_path: Path) -> None:
    """The error for a truncated file contains its name."""
    strategy = ready(single)
    strategy.save_checkpoint(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointDamagedError, match=r"a/model\.safetensors"):
        strategy.resume(tmp_path / "a")


# ---- load_or_resume ------------------------------------------------------------------------------------------------


def two_saved(make_single: Make, tmp_path: Path) -> None:
    """Save a model of zeros as epoch_1 and one of ones as epoch_2 in the work_dir."""
    for value in (0.0, 1.0):
        strategy = make_single()
        strategy.prepare(Line(value), optim_wrapper=ADAMW)
        strategy.save_checkpoint(tmp_path / f"epoch_{int(value) + 1}", extra_ckpt={"meta": {"epoch": int(value) + 1}})


@pytest.mark.parametrize(
    ("load_from", "resume", "weight", "resumed"),
    [
        (None, False, 2.0, None),
        ("epoch_1", False, 0.0, False),
        (None, "epoch_1", 0.0, True),
        (None, True, 1.0, True),
        ("epoch_1", True, 0.0, True),
        ("epoch_2", "epoch_1", 0.0, True),
    ],
)
def test_load_or_resume(
    single: Make, tmp_path: Path, load_from: str | None, resume: Any, weight: float, resumed: bool | None
) -> None:
    """``resume`` may be a path or True for the latest checkpoint, and takes precedence over ``load_from``."""
    two_saved(single, tmp_path)
    strategy = single()
    strategy.prepare(Line(), optim_wrapper=ADAMW)
    rest = strategy.load_or_resume(
        load_from=None if load_from is None else tmp_path / load_from,
        resume=str(tmp_path / resume) if isinstance(resume, str) else resume,
    )
    assert strategy.model.weight.item() == weight
    if resumed is None:
        assert rest is None
    else:
        assert ("optimizer" not in rest) is resumed
        assert rest["meta"]["epoch"] == int(weight) + 1


def test_resuming_without_a_checkpoint_starts_from_scratch(single: Make) -> None:
    """``resume=True`` without a checkpoint returns None and logs it."""
    strategy = ready(single)
    lines = Lines(strategy)
    assert strategy.load_or_resume(resume=True) is None
    assert "No checkpoint found" in lines.text


def test_an_incomplete_checkpoint_is_not_resumed(single: Make, tmp_path: Path) -> None:
    """A folder without a manifest, from a killed save, is skipped."""
    two_saved(single, tmp_path)
    (tmp_path / "epoch_3").mkdir()
    (tmp_path / "epoch_3" / "model.safetensors").write_bytes(b"half")
    strategy = single()
    strategy.prepare(Line(), optim_wrapper=ADAMW)
    assert strategy.load_or_resume(resume=True)["meta"]["epoch"] == 2


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("spoil", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_skipped_with_a_message(single: Make, tmp_path: Path, name: str, spoil: str) -> None:
    """The previous checkpoint is used, and the log contains the damaged checkpoint and file."""
    two_saved(single, tmp_path)
    file = tmp_path / "epoch_2" / name
    data = file.read_bytes()
    if spoil == "remove":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if spoil == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    strategy = single()
    strategy.prepare(Line(), optim_wrapper=ADAMW)
    lines = Lines(strategy)
    assert strategy.load_or_resume(resume=True)["meta"]["epoch"] == 1
    assert strategy.model.weight.item() == 0.0
    assert re.search(rf"WARNING Skipped checkpoint \S+epoch_2: .*{name}", lines.text)


def test_a_run_with_only_damaged_checkpoints_stops(single: Make, tmp_path: Path) -> None:
    """If all checkpoints are damaged, the run does not start from scratch, because it would overwrite them."""
    two_saved(single, tmp_path)
    for epoch in (1, 2):
        (tmp_path / f"epoch_{epoch}" / "state.json").unlink()
    strategy = single()
    strategy.prepare(Line(), optim_wrapper=ADAMW)
    with pytest.raises(CheckpointDamagedError, match=r"None of the 2 checkpoints .* resume=<path>"):
        strategy.load_or_resume(resume=True)


# ---- two ranks -----------------------------------------------------------------------------------------------------


def save_on_a_rank(folder: str, name: str) -> dict[str, Any]:
    """Save successfully, fail to save, and resume; return the observations."""
    strategy = make("ddp", folder, env={"randomness": {"seed": 0, "diff_rank_seed": True}})
    strategy.prepare(Mlp(), optim_wrapper=ADAMW, param_scheduler=SCHEDULE)
    train(strategy, [(batch()[0] * (1 + strategy.rank), batch()[1])] * 2)
    calls: list[int] = []
    strategy.save_checkpoint(f"{folder}/runs/{name}", callback=lambda _: calls.append(strategy.rank))
    drawn = torch.rand(4).tolist()
    try:
        bad = object() if strategy.rank == 0 else 0
        strategy.save_checkpoint(f"{folder}/runs/other_{name}", extra_ckpt={"bad": bad})
        error = None
    except StratagemError as failure:
        error = type(failure).__name__, str(failure)
    names = sorted(strategy.model_state_dict())
    strategy.close()
    again = make("ddp", folder)
    again.prepare(Mlp(), optim_wrapper=ADAMW, param_scheduler=SCHEDULE)
    again.load_or_resume(resume=f"{folder}/runs/{name}")
    facts = {
        "calls": calls,
        "drawn": drawn,
        "again": torch.rand(4).tolist(),
        "error": error,
        "names": names,
        "same": digest(again.unwrap_model()) == digest(strategy.unwrap_model()),
        "entries": sorted(path.name for path in Path(folder, "runs").iterdir()),
    }
    again.close()
    return facts


@FORMS
def test_ranks_save_and_fail_together(ranks: Ranks, tmp_path: Path, name: str) -> None:
    """All ranks contribute to a checkpoint and save their generators; an error on one rank is raised on both."""
    one, other = ranks.run(save_on_a_rank, str(tmp_path), name)
    assert (one["calls"], other["calls"]) == ([0], [1])
    assert one["drawn"] != other["drawn"]
    for facts in (one, other):
        assert facts["again"] == facts["drawn"]
        assert facts["same"]
        assert facts["entries"] == [name]
        assert facts["names"] == ["layers.0.bias", "layers.0.weight", "layers.2.bias", "layers.2.weight"]
        assert facts["error"][0] == "CheckpointError"
    assert other["error"][1].startswith("Rank 0 failed: CheckpointError: ")


def latest_on_a_rank(folder: str) -> float:
    """Resume from the latest checkpoint of rank 0; rank 1 has a different, empty work_dir."""
    own = make("ddp", folder if make("ddp", folder).rank == 0 else f"{folder}/elsewhere")
    own.prepare(Line(), optim_wrapper=ADAMW)
    own.load_or_resume(resume=True)
    own.close()
    return own.unwrap_model().weight.item()


def test_rank_0_chooses_the_latest_checkpoint(ranks: Ranks, single: Make, tmp_path: Path) -> None:
    """The latest checkpoint is chosen by rank 0."""
    two_saved(single, tmp_path)
    assert ranks.run(latest_on_a_rank, str(tmp_path)) == [1.0, 1.0]


ZERO = {"optimizer": {"type": "ZeroRedundancyOptimizer", "optimizer_type": "AdamW", "lr": 0.05}}


def spread_on_a_rank(folder: str) -> dict[str, Any]:
    """Train with an optimizer whose state is sharded, save, and resume in a new strategy."""
    # Importing torch.distributed.optim compiles functions with TorchScript, which causes a warning.
    warnings.simplefilter("ignore", DeprecationWarning)
    one = make("ddp", folder)
    one.prepare(Mlp(), optim_wrapper=ZERO)
    train(one, [batch()] * 3)
    one.save_checkpoint(f"{folder}/spread")
    expected = train(one, [batch()] * 3), digest(one.unwrap_model())
    one.close()
    other = make("ddp", folder)
    other.prepare(Mlp(), optim_wrapper=ZERO)
    other.resume(f"{folder}/spread")
    resumed = train(other, [batch()] * 3), digest(other.unwrap_model())
    other.close()
    return {"equal": resumed == expected, "losses": expected[0]}


def test_sharded_optimizer_state_is_saved_unsharded(ranks: Ranks, single: Make, tmp_path: Path) -> None:
    """Sharded optimizer state can be resumed by the same ranks, and by one process with a plain optimizer."""
    one, other = ranks.run(spread_on_a_rank, str(tmp_path))
    assert one["equal"]
    assert other["equal"]
    alone = single()
    alone.prepare(Mlp(), optim_wrapper=ADAMW)
    alone.resume(tmp_path / "spread")
    assert train(alone, [batch()] * 3) == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@FORMS
def test_a_checkpoint_records_whether_its_weights_are_finite(
    single: Make, tmp_path: Path, name: str, value: float
) -> None:
    """A checkpoint records whether its weights are finite, and the log warns about NaN or Inf."""
    strategy = single()
    lines = Lines(strategy)
    model = Mlp()
    strategy.prepare(model, optim_wrapper=ADAMW)
    strategy.save_checkpoint(tmp_path / name)
    assert CheckpointLoader.load_checkpoint(tmp_path / name)["meta"]["finite"] is True
    with torch.no_grad():
        model.layers[2].bias[1] = value
    strategy.save_checkpoint(tmp_path / name)
    assert CheckpointLoader.load_checkpoint(tmp_path / name)["meta"]["finite"] is False
    assert [line for line in lines.lines if "NaN or Inf weights" in line]


def save_with_one_bad_rank(folder: str) -> bool:
    """Save a checkpoint while one weight of rank 1 is NaN; return the recorded flag."""
    strategy = make("ddp", folder)
    strategy.prepare(Mlp(), optim_wrapper=ADAMW)
    if strategy.rank == 1:
        with torch.no_grad():
            strategy.unwrap_model().layers[0].bias.fill_(float("nan"))
    strategy.save_checkpoint(Path(folder) / "saved")
    strategy.close()
    return bool(CheckpointLoader.load_checkpoint(Path(folder) / "saved")["meta"]["finite"])


def test_the_weights_of_every_rank_are_checked(ranks: Ranks, tmp_path: Path) -> None:
    """NaN weights on any rank are recorded, not only those of rank 0, which writes."""
    assert ranks.run(save_with_one_bad_rank, str(tmp_path)) == [False, False]
