"""State of model, optimizer and schedulers: given out, loaded, saved, resumed."""

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

from ranks import Ranks
from small_runs import Line, Lines, Mlp, batch, digest, make, train
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

Make = Callable[..., BaseStrategy]

ADAMW = {"optimizer": {"type": "AdamW", "lr": 0.05}}
SCHEDULE = [
    {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 4},
    {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 4, "end": 12},
]
FORMS = pytest.mark.parametrize("name", ["saved", "saved.pth"])


def ready(make_single: Make, **kwargs: Any) -> BaseStrategy:
    """Return a strategy that trains an Mlp by AdamW and two schedules."""
    strategy = make_single(**kwargs)
    strategy.prepare(Mlp(), optim_wrapper=ADAMW, param_scheduler=SCHEDULE)
    return strategy


def several() -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with two optimizers, the second one with two groups."""
    model = Mlp()
    first, _, second = model.layers
    groups = [{"params": [second.weight], "lr": 0.2}, {"params": [second.bias]}]
    return model, {"a": OptimWrapper(SGD(first.parameters(), lr=0.1)), "b": OptimWrapper(SGD(groups, lr=0.3))}


# ---- state dicts ---------------------------------------------------------------------------------------------------


def test_the_models_state_is_on_the_cpu(single: Make) -> None:
    """Under the model's own names, detached."""
    strategy = ready(single)
    state = strategy.model_state_dict()
    assert list(state) == ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"]
    assert all(value.device.type == "cpu" and not value.requires_grad for value in state.values())


def test_without_an_optimizer_its_state_is_a_type_error(single: Make) -> None:
    """The error says how to have one."""
    strategy = single()
    strategy.prepare(Mlp())
    with pytest.raises(ConfigTypeError, match=r"Call prepare\(model, optim_wrapper=...\)") as caught:
        strategy.optim_state_dict()
    assert isinstance(caught.value, TypeError)


def test_optimizer_and_schedulers_go_where_their_state_was(single: Make) -> None:
    """A strategy that loads the three states continues as the first one."""
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
    """Optimizers and schedulers: name -> state, name -> list."""
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
        ("one", [{}], "has 1 schedulers, this run has 2"),
        ("one", {"a": []}, r"belong to several optimizer"),
        ("several", [{}], "belong to one optimizer"),
        ("several", {"a": [], "c": []}, r"schedulers for \['a', 'c'\], this run for \['a', 'b'\]"),
        ("several", {"a": [{}], "b": [{}, {}]}, "has 1 schedulers, this run has 2"),
    ],
)
def test_other_schedulers_are_refused(single: Make, kind: str, states: Any, message: str) -> None:
    """A different number is never cut to the shorter one."""
    strategy = single()
    model, optim = several() if kind == "several" else (Mlp(), ADAMW)
    strategy.prepare(model, optim_wrapper=optim, param_scheduler=SCHEDULE)
    with pytest.raises(CheckpointMismatchError, match=message):
        strategy.load_scheduler_state_dict(states)


# ---- loading weights -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_reported_once_and_the_rest_is_loaded(single: Make) -> None:
    """Missing, unexpected and shape_mismatches keys stand in one warning; with strict they are an error that changes nothing."""
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
        "layers.2.weight (saved [5, 8], here [3, 8])",
    ):
        assert part in line


def test_what_fits_is_not_worth_a_line(single: Make) -> None:
    """No warning after a whole match."""
    strategy = ready(single)
    lines = Lines(strategy)
    assert strategy.load_model_state_dict(strategy.model_state_dict()).exact
    assert lines.lines == []


def test_a_checkpoint_that_matches_nothing_is_refused_even_if_not_strict(single: Make, tmp_path: Path) -> None:
    """A run does not go on with random weights (defect 12)."""
    save_checkpoint({"state_dict": {"backbone.weight": torch.ones(1)}}, tmp_path / "other.pth")
    strategy = ready(single)
    with pytest.raises(CheckpointMismatchError, match="No key of the checkpoint belongs to this model"):
        strategy.load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_understood(single: Make, tmp_path: Path, prefix: str) -> None:
    """Checkpoints of DDP and of compiled models load as they are (defect 12)."""
    strategy = ready(single)
    wanted = {name: torch.full_like(value, 0.5) for name, value in strategy.model_state_dict().items()}
    save_checkpoint({"state_dict": {prefix + name: value for name, value in wanted.items()}}, tmp_path / "a.pth")
    strategy.load_checkpoint(tmp_path / "a.pth", strict=True)
    assert all(value.eq(0.5).all() for value in strategy.model_state_dict().values())


class Listed(BaseModel):
    """Its parameters begin with the letters of a wrapper's prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.modules_list = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x: Any, mode: str = "tensor") -> Any:
        return self.modules_list[0](x)


def test_a_parameter_called_modules_list_is_not_cut_to_list(single: Make) -> None:
    """The default revise_keys take a dot as a dot (B3)."""
    strategy = single()
    strategy.prepare(Listed())
    state = {"modules_list.0.weight": torch.ones(2, 2), "modules_list.0.bias": torch.ones(2)}
    assert strategy.load_model_state_dict(state).exact
    assert strategy.model.modules_list[0].weight.eq(1).all()


def test_keys_are_revised_as_asked(single: Make, tmp_path: Path) -> None:
    """(pattern, replacement) in turn."""
    strategy = ready(single)
    state = {name.replace("layers", "net.body"): value for name, value in strategy.model_state_dict().items()}
    save_checkpoint({"state_dict": state}, tmp_path / "a.pth")
    strategy.load_checkpoint(tmp_path / "a.pth", strict=True, revise_keys=[(r"^net\.", ""), (r"^body", "layers")])


def test_loading_a_checkpoint_loads_weights_alone(single: Make, tmp_path: Path) -> None:
    """Optimizer and schedules stay; the rest of the checkpoint is returned; the callback sees it before it is loaded."""
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
def test_a_checkpoint_that_is_not_there_is_named(single: Make, tmp_path: Path, name: str) -> None:
    """It is a FileNotFoundError."""
    strategy = ready(single)
    for act in (strategy.load_checkpoint, strategy.resume):
        with pytest.raises(CheckpointNotFoundError, match=name):
            act(tmp_path / name)


def test_map_location_says_where_tensors_go(single: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """load_checkpoint reads to the CPU, resume to the strategy's device, unless told otherwise."""
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
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(single: Make, tmp_path: Path, name: str) -> None:
    """Weights, moments, learning rates, schedules and the three generators, exactly (defect 4)."""
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
    """Each gets its own state and learning rates."""
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
def test_a_checkpoint_has_the_keys_that_people_know(single: Make, tmp_path: Path, name: str) -> None:
    """state_dict, optimizer, param_schedulers, meta with seed, time and version; extra_ckpt is merged in."""
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


def test_parts_can_be_left_out_and_the_callback_comes_last(single: Make, tmp_path: Path) -> None:
    """What the callback changes is what is written."""
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


def test_resuming_returns_the_rest_and_shows_all_to_the_callback(single: Make, tmp_path: Path) -> None:
    """The callback runs before anything is restored and may change what is."""
    strategy = ready(single)
    strategy.save_checkpoint(tmp_path / "a", extra_ckpt={"note": 1})

    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["layers.2.bias"] = torch.full((3,), 9.0)

    rest = strategy.resume(tmp_path / "a", callback=change)
    assert set(rest) == {"meta", "note"}
    assert strategy.model.layers[2].bias.tolist() == [9.0, 9.0, 9.0]


@pytest.mark.parametrize("part", ["optimizer", "param_scheduler"])
def test_a_checkpoint_without_a_part_cannot_be_resumed(single: Make, tmp_path: Path, part: str) -> None:
    """The error says how to go on; doing so works and leaves that part as it is."""
    strategy = ready(single)
    rates = strategy.optim_wrapper.get_lr()
    strategy.save_checkpoint(tmp_path / "a", **{f"save_{part}": False})
    train(strategy, [batch()] * 3)
    with pytest.raises(CheckpointMismatchError, match=f"resume_{part}=False"):
        strategy.resume(tmp_path / "a")
    moved = strategy.optim_wrapper.get_lr()
    strategy.resume(tmp_path / "a", resume_optimizer=False, resume_param_scheduler=False)
    assert strategy.optim_wrapper.get_lr() == moved != rates


def test_another_model_cannot_be_resumed(single: Make, tmp_path: Path) -> None:
    """Resuming is strict: its moments would be applied to other parameters (B12)."""
    ready(single).save_checkpoint(tmp_path / "a")
    strategy = single()
    strategy.prepare(Line(), optim_wrapper=ADAMW)
    with pytest.raises(CheckpointMismatchError):
        strategy.resume(tmp_path / "a")


def test_other_parameter_groups_or_optimizers_are_refused(single: Make, tmp_path: Path) -> None:
    """Another number of groups; one optimizer in the place of several, and the other way round."""
    ready(single).save_checkpoint(tmp_path / "one")
    strategy = single()
    model, optim = several()
    strategy.prepare(model, optim_wrapper=optim)
    with pytest.raises(CheckpointMismatchError, match=r"this run has \['a', 'b'\]"):
        strategy.resume(tmp_path / "one")
    strategy.save_checkpoint(tmp_path / "several")
    with pytest.raises(CheckpointMismatchError, match="it is that of several optimizers, and this run has one"):
        ready(single).resume(tmp_path / "several", resume_param_scheduler=False)
    grouped = single()
    grouped.prepare(Mlp(), optim_wrapper={**ADAMW, "paramwise_cfg": {"bias_lr_mult": 2.0}})
    with pytest.raises(CheckpointMismatchError, match="1 parameter groups, this run's has 2"):
        grouped.resume(tmp_path / "one")


def test_other_schedulers_cannot_be_resumed(single: Make, tmp_path: Path) -> None:
    """Two were saved, one is there."""
    ready(single).save_checkpoint(tmp_path / "a")
    strategy = single()
    strategy.prepare(Mlp(), optim_wrapper=ADAMW, param_scheduler=SCHEDULE[:1])
    with pytest.raises(CheckpointMismatchError, match="has 2 schedulers, this run has 1"):
        strategy.resume(tmp_path / "a")


def test_another_seed_is_warned_of_and_the_checkpoints_taken(single: Make, tmp_path: Path) -> None:
    """The order of the data hangs on it; a seed that was drawn is no wish, so nothing is said."""
    ready(single, seed=3).save_checkpoint(tmp_path / "a")
    given, drawn = ready(single, seed=4), ready(single, seed=None)
    lines = [Lines(given), Lines(drawn)]
    for strategy in (given, drawn):
        strategy.resume(tmp_path / "a")
        assert (strategy.seed, strategy.randomness["seed"]) == (3, 3)
    assert "WARNING The checkpoint's seed is 3, this run's is 4." in lines[0].text
    assert "WARNING" not in lines[1].text


def test_another_batch_size_is_said_in_the_log(single: Make, tmp_path: Path) -> None:
    """With what it means."""
    for size, log in (
        (8, None),
        (4, "with 8 samples in a rank's micro-batch, this run has 4: iterations are of another size"),
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
    """Saved after 2 of 5 micro-batches with windows of two: an update after the 4th and after the 5th, the last one.

    Where they were is in the optimizer's state; the meta of the run need not tell.
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
def test_a_save_that_fails_leaves_what_was_there(single: Make, tmp_path: Path, name: str) -> None:
    """The older checkpoint of that name is whole, and nothing else is left beside it (defect 11)."""
    strategy = ready(single)
    strategy.save_checkpoint(tmp_path / "runs" / name)
    with pytest.raises(CheckpointError, match="object"):
        strategy.save_checkpoint(tmp_path / "runs" / name, extra_ckpt={"bad": object()})
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [name]
    strategy.resume(tmp_path / "runs" / name)


def test_a_truncated_checkpoint_is_refused_by_name(single: Make, tmp_path: Path) -> None:
    """The file is named."""
    strategy = ready(single)
    strategy.save_checkpoint(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointDamagedError, match=r"a/model\.safetensors"):
        strategy.resume(tmp_path / "a")


# ---- load_or_resume ------------------------------------------------------------------------------------------------


def two_saved(make_single: Make, tmp_path: Path) -> None:
    """Save a model of zeros as epoch_1 and one of ones as epoch_2, in the work_dir."""
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
    """Nothing; the weights of load_from; a path; the latest of the work_dir; load_from; the path before load_from."""
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


def test_resuming_where_nothing_was_saved_begins_anew(single: Make) -> None:
    """It returns None and says so."""
    strategy = ready(single)
    lines = Lines(strategy)
    assert strategy.load_or_resume(resume=True) is None
    assert "No checkpoint to resume from" in lines.text


def test_what_a_killed_save_left_is_not_resumed(single: Make, tmp_path: Path) -> None:
    """A folder without a manifest, newer than the whole one, is passed over (defect 11)."""
    two_saved(single, tmp_path)
    (tmp_path / "epoch_3").mkdir()
    (tmp_path / "epoch_3" / "model.safetensors").write_bytes(b"half")
    strategy = single()
    strategy.prepare(Line(), optim_wrapper=ADAMW)
    assert strategy.load_or_resume(resume=True)["meta"]["epoch"] == 2


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("spoil", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_with_a_message(
    single: Make, tmp_path: Path, name: str, spoil: str
) -> None:
    """The next older one is taken, weights and all, and the log names the checkpoint and the file that is damaged."""
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
    assert re.search(rf"WARNING The checkpoint \S+epoch_2 is passed over: .*{name}", lines.text)


def test_where_all_are_damaged_the_run_does_not_begin_anew_by_itself(single: Make, tmp_path: Path) -> None:
    """It would write over what may still be mended; the error says how many there are and what to do."""
    two_saved(single, tmp_path)
    for epoch in (1, 2):
        (tmp_path / f"epoch_{epoch}" / "state.json").unlink()
    strategy = single()
    strategy.prepare(Line(), optim_wrapper=ADAMW)
    with pytest.raises(CheckpointDamagedError, match=r"None of the 2 checkpoints .* resume=<path>"):
        strategy.load_or_resume(resume=True)


# ---- two ranks -----------------------------------------------------------------------------------------------------


def save_on_a_rank(folder: str, name: str) -> dict[str, Any]:
    """Save well and badly, resume, and return what was seen."""
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
    """Each rank makes the tree and keeps its generator; a failure there is an error of the same kind on both, traceless."""
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
    """Resume from the latest checkpoint that rank 0 sees; rank 1 has a work_dir of its own that is empty."""
    own = make("ddp", folder if make("ddp", folder).rank == 0 else f"{folder}/elsewhere")
    own.prepare(Line(), optim_wrapper=ADAMW)
    own.load_or_resume(resume=True)
    own.close()
    return own.unwrap_model().weight.item()


def test_ranks_agree_on_the_latest_checkpoint(ranks: Ranks, single: Make, tmp_path: Path) -> None:
    """It is rank 0's choice, whatever the others see."""
    two_saved(single, tmp_path)
    assert ranks.run(latest_on_a_rank, str(tmp_path)) == [1.0, 1.0]


ZERO = {"optimizer": {"type": "ZeroRedundancyOptimizer", "optimizer_type": "AdamW", "lr": 0.05}}


def spread_on_a_rank(folder: str) -> dict[str, Any]:
    """Train with an optimizer whose state is spread over the ranks, save, and go on in another strategy."""
    # torch.distributed.optim scripts functions when it is imported, and torch warns of that.
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


def test_an_optimizer_spread_over_ranks_is_saved_whole(ranks: Ranks, single: Make, tmp_path: Path) -> None:
    """Its state is resumed by as many ranks, and by one process with the plain optimizer."""
    one, other = ranks.run(spread_on_a_rank, str(tmp_path))
    assert one["equal"]
    assert other["equal"]
    alone = single()
    alone.prepare(Mlp(), optim_wrapper=ADAMW)
    alone.resume(tmp_path / "spread")
    assert train(alone, [batch()] * 3) == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@FORMS
def test_a_checkpoint_says_whether_its_weights_are_finite(
    single: Make, tmp_path: Path, name: str, value: float
) -> None:
    """One bad weight is enough, and the log warns of it."""
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
    assert [line for line in lines.lines if "not finite" in line]


def save_with_one_bad_rank(folder: str) -> bool:
    """Save a checkpoint while one weight of rank 1 is bad; return what it says."""
    strategy = make("ddp", folder)
    strategy.prepare(Mlp(), optim_wrapper=ADAMW)
    if strategy.rank == 1:
        with torch.no_grad():
            strategy.unwrap_model().layers[0].bias.fill_(float("nan"))
    strategy.save_checkpoint(Path(folder) / "saved")
    strategy.close()
    return bool(CheckpointLoader.load_checkpoint(Path(folder) / "saved")["meta"]["finite"])


def test_the_weights_of_every_rank_must_be_finite(ranks: Ranks, tmp_path: Path) -> None:
    """Rank 0, which writes, cannot know it alone."""
    assert ranks.run(save_with_one_bad_rank, str(tmp_path)) == [False, False]
