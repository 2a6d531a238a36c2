"""Record runs with ``TraceHook``: in one process, with accumulation, and on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from stratagem import BaseModel, Hook, Runner
from stratagem.errors import ConfigValueError
from stratagem.optim.gradients import Clipping
from stratagem.trace import Part, Tolerances, Trace, compare, read_trace
from stratagem.train.hooks import TraceHook
from tests.support.ranks import Ranks

ROUNDING = Tolerances(relative=2e-5, floor=1e-3)


class Points(Dataset):
    """Points in four dimensions with one of three classes, or -100 if it is unknown."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        label = torch.tensor(-100 if index % 5 == 0 else index % 3)
        return {"inputs": torch.randn(4, generator=generator), "labels": label}


class Classifier(BaseModel):
    """Two layers. The weight of a micro-batch is the number of its known labels."""

    def __init__(self, *, weighted: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(dropout)
        # Its weight is read without calling it.
        self.shift = nn.Embedding(2, 8)
        self.register_buffer("limits", torch.tensor([1.0, 2.0]))
        self.weighted = weighted

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        """Return the loss."""
        labels = labels if self.weighted else labels.clamp(min=0)
        loss = cross_entropy(self.last(self.dropout((self.first(inputs) + self.shift.weight[0]).tanh())), labels)
        return {"loss": loss, "weight": (labels >= 0).sum()} if self.weighted else {"loss": loss}


def train(
    folder: Path,
    *hooks: Any,
    strategy: Any = "SingleDeviceStrategy",
    batch_size: int = 16,
    counts: int = 1,
    weighted: bool = False,
    dropout: float = 0.0,
    steps: int = 3,
    average: bool = True,
    clip: Any = {"max_norm": 0.5},  # noqa: B006 -- not changed
    **options: Any,
) -> dict[str, Tensor]:
    """Train for some steps of 16 samples in total, and return the state of the model."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "model": Classifier(weighted=weighted, dropout=dropout),
        "work_dir": str(folder / "work"),
        "train_dataloader": {"dataset": Points(), "batch_size": batch_size, "sampler": {"type": "DefaultSampler"}},
        "optim_wrapper": {
            "type": "OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": 0.01},
            "clip_grad": clip,
            "accumulative_counts": counts,
        },
        "train_cfg": {"by_epoch": False, "max_iters": steps * counts},
        "strategy": {"type": strategy} if isinstance(strategy, str) else strategy,
        "randomness": {"seed": 0},
        "log_level": "ERROR",
        "default_hooks": {"checkpoint": None},
        "custom_hooks": [*([{"type": "EMAHook", "momentum": 0.1}] if average else []), *hooks],
        **options,
    }
    runner = Runner.from_cfg(config)
    try:
        runner.train()
        state = runner.strategy.model_state_dict()
        return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    finally:
        runner.close()


def recorded(folder: Path, name: str, *hooks: Any, **options: Any) -> Trace:
    """Train in this process, and return the trace."""
    train(folder, *hooks, TraceHook(folder / name), **options)
    return read_trace(folder / name)


def record_on_rank(folder: Path, jobs: dict[str, dict[str, Any]]) -> None:
    """Train on this rank, once for each job, in the process group of the test."""
    for name, options in jobs.items():
        train(folder / name, TraceHook(folder / f"{name}.json"), **options)


class Normalized(BaseModel):
    """A classifier with buffers in a part that can be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        """Return the loss."""
        return {"loss": cross_entropy(self.body(inputs), labels.clamp(min=0))}


@pytest.mark.slow
def test_the_buffers_of_a_compiled_part_have_the_names_of_checkpoints(tmp_path: Path) -> None:
    """The wrapper of ``torch.compile`` is not part of their names, so the traces with and without it can be compared."""
    plain, compiled = Normalized(), Normalized()
    compiled.load_state_dict(plain.state_dict())
    compiled.body = torch.compile(compiled.body, backend="eager")  # type: ignore[assignment]
    one = recorded(tmp_path, "plain.json", model=plain, steps=1)
    other = recorded(tmp_path, "compiled.json", model=compiled, steps=1)
    names = {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}
    assert one.ranks[0].steps[0].buffers.keys() == other.ranks[0].steps[0].buffers.keys() == names
    assert compare(one, other, ROUNDING).equal


def test_a_run_is_recorded_in_all_parts(tmp_path: Path) -> None:
    """No value of a run in one process is hidden, and the values agree with each other."""
    trace = recorded(tmp_path, "a.json")
    assert trace.num_steps == 3
    assert trace.label == "SingleDeviceStrategy"
    step = trace.ranks[0].steps[1]
    assert step.absent == {}
    assert [len(batch) for batch in step.samples or ()] == [16]
    assert set(step.all_samples or ()) <= {str(index) for index in range(64)}
    assert step.losses == (step.loss,)
    names = {"first.weight", "first.bias", "last.weight", "last.bias", "shift.weight"}
    for section in ("before", "local", "reduced", "clipped", "after", "averaged"):
        assert (step.section(section) or {}).keys() >= names, section
    assert (step.buffers or {})["limits"].numbers.tolist() == [1.0, 2.0]
    for name in names:
        assert (step.local or {})[name].digest == (step.reduced or {})[name].digest
        assert (step.before or {})[name].digest == (trace.ranks[0].steps[0].after or {})[name].digest
    squares = sum(value.norm**2 for value in (step.reduced or {}).values())
    assert step.grad_norm == pytest.approx(squares**0.5, rel=1e-6)
    clipped = sum(value.norm**2 for value in (step.clipped or {}).values()) ** 0.5
    assert clipped == pytest.approx(min(0.5, step.grad_norm), rel=1e-5)
    [group] = step.groups or ()
    assert group.options["lr"] == 0.01
    assert set(group.parameters) == names


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recording_does_not_change_a_run(tmp_path: Path, dropout: float) -> None:
    """With and without the hook, all bits of the model are equal, and a second recording is equal to the first."""
    plain = train(tmp_path, dropout=dropout, counts=2, batch_size=8)
    with_hook = train(tmp_path, TraceHook(tmp_path / "a.json"), dropout=dropout, counts=2, batch_size=8)
    assert all(torch.equal(value, with_hook[name]) for name, value in plain.items())
    again = recorded(tmp_path, "b.json", dropout=dropout, counts=2, batch_size=8)
    assert compare(read_trace(tmp_path / "a.json"), again).largest is None


def test_the_hook_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    """After the recording, the optimizer wrapper has its own clipping and policy, and the optimizer has no step hooks."""
    seen: list[Any] = []

    class Check(Hook):
        """Looks at the wrapper before and after the recording."""

        priority = "HIGHEST"

        def before_train(self, run: Any) -> None:
            """Note what the wrapper has before the recording."""
            self._look(run.optim_wrapper)

        def after_train(self, run: Any) -> None:
            """Note what the wrapper has after the recording."""
            self._look(run.optim_wrapper)

        def _look(self, wrapper: Any) -> None:
            hooks = dict(wrapper.optimizer._optimizer_step_pre_hooks)
            seen.append((wrapper.clipping, wrapper.gradient_policy.complete, hooks))

    train(tmp_path, TraceHook(tmp_path / "a.json", steps=2), Check())
    assert seen[0] == seen[1]
    assert read_trace(tmp_path / "a.json").num_steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_two_micro_batches_equal_one_batch(tmp_path: Path, weighted: bool) -> None:
    """Losses and gradients are (weighted) means over the micro-batches, so they differ only by rounding."""
    whole = recorded(tmp_path, "one.json", weighted=weighted)
    parts = recorded(tmp_path, "two.json", weighted=weighted, counts=2, batch_size=8)
    result = compare(whole, parts, ROUNDING)
    assert result.first is None, result.first
    assert len(parts.ranks[0].steps[0].losses or ()) == 2


@pytest.mark.slow
def test_without_clipping_the_clipped_gradients_are_the_reduced_ones(tmp_path: Path) -> None:
    """They are recorded before the update, and there is no gradient norm."""
    step = recorded(tmp_path, "a.json", clip=None).ranks[0].steps[0]
    assert step.grad_norm is None
    assert [value.digest for value in (step.reduced or {}).values()] == [
        v.digest for v in (step.clipped or {}).values()
    ]


@pytest.mark.slow
def test_ids_and_digests_identify_the_samples(tmp_path: Path) -> None:
    """The function ``ids`` takes precedence over the indices of the sampler."""
    hook = TraceHook(tmp_path / "a.json", ids=lambda run, batch_idx: [f"{run.iter}/{batch_idx}"])
    train(tmp_path, hook)
    assert [step.samples for step in read_trace(tmp_path / "a.json").ranks[0].steps] == [
        (("0/0",),),
        (("1/1",),),
        (("2/2",),),
    ]


@pytest.mark.slow
def test_the_hook_can_be_configured_by_name(tmp_path: Path) -> None:
    """``TraceHook`` is in the registry of hooks."""
    train(tmp_path, {"type": "TraceHook", "path": str(tmp_path / "a.json"), "label": "mine", "steps": 1})
    trace = read_trace(tmp_path / "a.json")
    assert (trace.num_steps, trace.label) == (1, "mine")


@pytest.mark.slow
def test_a_window_that_began_before_the_recording_is_recorded_without_its_micro_batches(tmp_path: Path) -> None:
    """A run that resumes after the first of two micro-batches has not seen its samples, loss and gradients."""
    options: dict[str, Any] = {
        "counts": 2,
        "batch_size": 8,
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1, "by_epoch": False}},
    }
    train(tmp_path, **options)
    train(tmp_path, TraceHook(tmp_path / "a.json"), resume=str(tmp_path / "work" / "iter_3"), **options)
    first, second = read_trace(tmp_path / "a.json").ranks[0].steps
    assert (first.local, first.samples, first.loss, first.losses) == (None, None, None, None)
    assert first.absent == dict.fromkeys(
        ("samples", "losses", "loss", "local"), "the accumulation window began before the recording"
    )
    assert second.absent == {}


def test_the_hook_requires_at_least_one_step() -> None:
    """The error names the argument."""
    with pytest.raises(ConfigValueError, match="steps=0 must be at least 1"):
        TraceHook("a.json", steps=0)


class Fault(Hook):
    """Changes something in the second iteration."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Change the model or the optimizer."""
        if run.iter != 1:
            return
        wrapper = run.optim_wrapper
        if self.part is Part.SCHEDULE:
            wrapper.param_groups[0]["lr"] *= 2
        elif self.part is Part.START:
            run.strategy.unwrap_model().last.bias.data += 0.1
        elif self.part is Part.CLIP:
            wrapper.clipping._clipping = Clipping(by_norm=True, limit=0.01)
        elif self.part is Part.FORWARD:
            data_batch["labels"].fill_(1)


@pytest.mark.slow
@pytest.mark.parametrize("part", [Part.START, Part.FORWARD, Part.CLIP, Part.SCHEDULE])
def test_a_fault_in_a_run_is_found_in_its_part_and_step(tmp_path: Path, part: Part) -> None:
    """The runs differ in one statement of step 2."""
    first = compare(recorded(tmp_path, "a.json"), recorded(tmp_path, "b.json", Fault(part))).first
    assert first is not None
    assert (first.step, first.part) == (2, part)


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path, ranks: Ranks) -> None:
    """Under DDP and FSDP, with and without weights and accumulation, all parts are equal up to rounding; none is hidden."""
    jobs = {
        "ddp": {"strategy": "DDPStrategy", "batch_size": 8},
        "ddp_weighted": {"strategy": "DDPStrategy", "batch_size": 4, "counts": 2, "weighted": True},
        "fsdp": {"strategy": "FSDPStrategy", "batch_size": 8},
        "fsdp_weighted": {"strategy": "FSDPStrategy", "batch_size": 4, "counts": 2, "weighted": True},
    }
    ranks.run(record_on_rank, tmp_path, jobs)
    references = {weighted: recorded(tmp_path, f"{weighted}.json", weighted=weighted) for weighted in (False, True)}
    for name, options in jobs.items():
        trace = read_trace(tmp_path / f"{name}.json")
        assert [step.absent for rank in trace.ranks for step in rank.steps] == [{}] * 6, name
        result = compare(references[options.get("weighted", False)], trace, ROUNDING)
        assert set(result.sizes) == set(Part), name
        assert result.first is None, (name, result.first)
        local = [(rank.steps[0].local or {})["last.weight"].digest for rank in trace.ranks]
        assert local[0] != local[1], name
