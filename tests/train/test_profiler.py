"""Profiles of training: named parts, the trace, the advice, and unchanged results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stratagem import Runner
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.optim import OptimWrapper
from stratagem.train import Hook
from stratagem.train.hooks.profiler import ProfilerHook
from stratagem.train.profiling.host_reads import HostRead, HostReads
from stratagem.train.profiling.ranges import StepRanges
from stratagem.train.profiling.report import ProfiledRun, build_profile
from tests.support.ranks import Ranks
from tests.train.toys import At, Samples, Toy, loader, settings

MakeRunner = Callable[..., Runner]
CLIPPED = {"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}, "clip_grad": {"max_norm": 1.0}}


class Reading(Toy):
    """A model that reads a value in its forward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        losses = super().forward(*args, **kwargs)
        losses["loss"].item()
        return losses


class SlowSamples(Samples):
    """Takes 20 ms per sample."""

    def __getitem__(self, index: int) -> Any:
        sleep(0.02)
        return super().__getitem__(index)


class SlowHook(Hook):
    """Takes 30 ms after each iteration."""

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        sleep(0.03)


def events(path: str | Path) -> list[dict[str, Any]]:
    """Return the events of a Chrome trace after checking what Perfetto requires of them."""
    trace = json.loads(Path(path).read_text(encoding="utf-8"))
    for event in trace["traceEvents"]:
        assert {"ph", "pid", "name"} <= event.keys()
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert isinstance(event["ts"], float | int)
            assert "tid" in event
    require_nested(trace["traceEvents"])
    return trace["traceEvents"]  # type: ignore[no-any-return]


def require_nested(trace: list[dict[str, Any]]) -> None:
    """Require that an event of a thread that begins inside another one also ends inside it; Perfetto drops others."""
    open_until: dict[tuple[Any, Any], list[tuple[float, str]]] = {}
    complete = [event for event in trace if event["ph"] == "X"]
    for event in sorted(complete, key=lambda each: (each["ts"], -each["dur"])):
        end, stack = event["ts"] + event["dur"], open_until.setdefault((event["pid"], event["tid"]), [])
        # Times are in microseconds, and are written with three decimals.
        while stack and stack[-1][0] <= event["ts"] + 0.002:
            stack.pop()
        assert not stack or end <= stack[-1][0] + 0.002, f"{event['name']} overlaps with {stack[-1][1]}"
        stack.append((end, event["name"]))


@pytest.mark.slow
def test_the_parts_of_an_iteration_add_up_to_its_duration(make_runner: MakeRunner) -> None:
    """Two samples of 20 ms are at least 40 ms of data; a hook of 30 ms is part of the hooks; the trace has all parts."""
    hook = ProfilerHook(start=1, warmup=1, active=3)
    data = {**loader(), "dataset": SlowSamples()}
    runner = make_runner(
        train_dataloader=data, custom_hooks=[SlowHook(), hook], optim_wrapper=CLIPPED, train_cfg={"max_epochs": 1}
    )
    runner.train()
    found = hook.profile
    assert found is not None
    assert found.iterations == 3
    assert found.parts["data"] >= 0.04
    assert found.parts["hooks"] >= 0.03
    named_parts = {"data", "forward", "backward", "clipping", "optimizer", "hooks"}
    assert set(found.parts) == {*named_parts, "gradient synchronization"}
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert any(line.startswith("Waiting for data takes") and "Set num_workers" in line for line in found.advice)
    assert any(line.startswith("Hooks take") for line in found.advice)
    named = {event["name"] for event in events(found.trace) if event.get("cat") == "user_annotation"}
    assert {f"stratagem: {part}" for part in found.parts} <= named
    report = json.loads((Path(runner.strategy.log_dir) / "profile" / "rank0.json").read_text())
    assert report["parts"] == dict(found.parts)
    assert "share" in "\n".join(found.lines())


@pytest.mark.slow
def test_a_profile_does_not_change_the_training_and_leaves_nothing_in_checkpoints(
    make_runner: MakeRunner, tmp_path: Path
) -> None:
    """Weights have the same bits with and without the hook, under accumulation, with a validation inside the profile."""
    states = []
    for name, extra in (("without", []), ("profiled", [ProfilerHook(start=2, warmup=1, active=8)])):
        runner = make_runner(
            work_dir=tmp_path / name,
            custom_hooks=extra,
            optim_wrapper={**CLIPPED, "accumulative_counts": 2},
            train_cfg={"max_epochs": 2},
            default_hooks={"runtime_info": None, "logger": None},
        )
        runner.train()
        assert "train_step" not in vars(runner.strategy.model)
        assert not {"step", "_backward"} & vars(runner.strategy.optim_wrapper).keys()
        states.append({key: value.clone() for key, value in runner.strategy.model_state_dict().items()})
        assert b"rofiler" not in (tmp_path / name / "epoch_2" / "manifest.json").read_bytes()
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


@pytest.mark.slow
def test_a_read_by_the_host_is_reported_with_its_line(make_runner: MakeRunner) -> None:
    """The line with ``item()`` in the model is found, with the number of calls in an iteration."""
    hook = ProfilerHook(start=0, warmup=1, active=1, stop_after=True)
    runner = make_runner(model=Reading(), custom_hooks=[hook])
    runner.train()
    assert hook.profile is not None
    line = Reading.forward.__code__.co_firstlineno + 2
    (read,) = [each for each in hook.profile.host_reads if each.line is not None]
    assert read == HostRead(f"{__file__}:{line}", "_local_scalar_dense", 1)
    assert any(f":{line} reads a value in each iteration" in advice for advice in hook.profile.advice)
    assert runner.run.iter == 3


@pytest.mark.slow
def test_a_training_that_is_too_short_for_its_profile_is_reported(make_runner: MakeRunner) -> None:
    """The log explains that no iteration was recorded; a profile that is cut off contains the iterations that ran."""
    late, cut = ProfilerHook(start=7), ProfilerHook(start=0, warmup=2, active=9)
    runner = make_runner(custom_hooks=[late], train_cfg={"max_epochs": 1}, log_level="WARNING")
    runner.train()
    assert late.profile is None
    text = next(Path(runner.strategy.log_dir).glob("*.log")).read_text()
    assert "the training ended after 7 iterations of this session, before any of the iterations to record" in text
    make_runner(custom_hooks=[cut], train_cfg={"max_epochs": 1}).train()
    assert cut.profile is not None
    assert cut.profile.iterations == 5


@pytest.mark.slow
def test_a_failed_training_leaves_no_profiler_and_no_observers(make_runner: MakeRunner) -> None:
    """After an error in a recorded iteration, closing the runner stops the profiler and restores the methods."""

    def fail(run: Any) -> None:
        raise RuntimeError("stop")

    hook = ProfilerHook(start=0, warmup=1, active=3)
    runner = make_runner(custom_hooks=[hook, At(3, fail)])
    with pytest.raises(RuntimeError, match="stop"):
        runner.train()
    runner.close()
    assert not torch.autograd.profiler._is_profiler_enabled  # type: ignore[attr-defined]
    assert "train_step" not in vars(runner.strategy.model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"active": 0}, ConfigValueError, "expected active >= 1"),
        ({"warmup": 0}, ConfigValueError, "expected warmup >= 1"),
        ({"start": -1}, ConfigValueError, "expected start >= 0"),
        ({"ranks": ["0"]}, ConfigTypeError, "expected ranks to be a list of integers"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """The message contains the valid values."""
    with pytest.raises(error, match=message):
        ProfilerHook(**options)


class OwnBackward(OptimWrapper):
    """A wrapper that overrides ``backward``, as those of engines do."""

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        super().backward(loss, **kwargs)


@pytest.mark.parametrize("kind", [OptimWrapper, OwnBackward])
def test_the_backward_pass_is_a_part_also_if_a_wrapper_overrides_it(kind: type[OptimWrapper]) -> None:
    """The part is measured for the built-in method and for one of a subclass."""
    model, ranges = Toy(), StepRanges()
    optim = kind(torch.optim.SGD(model.parameters(), lr=0.1))
    batch = next(iter(torch.utils.data.DataLoader(Samples(), 2)))
    with ranges.observing({"": optim}):
        ranges.begin()
        ranges.switch("forward")
        model.train_step(batch, optim_wrapper=optim)
        ranges.end()
    assert set(ranges.seconds) == {"forward", "backward", "optimizer"}
    assert not {"_backward", "backward", "step"} & vars(optim).keys()


def test_a_part_interrupts_the_one_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are exclusive: of 10 seconds, an inner part of 3 seconds is not in the outer one."""
    now = [0.0]
    monkeypatch.setattr("stratagem.train.profiling.ranges.perf_counter", lambda: now[0])
    ranges = StepRanges()
    ranges.begin()
    ranges.switch("outer")
    now[0] = 4.0
    with ranges.inside("inner"):
        now[0] = 7.0
    now[0] = 10.0
    ranges.end()
    assert ranges.seconds == {"outer": 7.0, "inner": 3.0}


def test_reads_outside_of_user_code_have_no_line() -> None:
    """Reads by a function in this file have its lines; those by an optimizer that it calls, and by the block, have none."""
    weight = torch.ones(1, requires_grad=True)
    weight.grad = torch.ones(1)
    optimizer = torch.optim.Adam([weight], foreach=False)

    def read() -> None:
        int(torch.ones(1))
        torch.unique(torch.ones(1))
        optimizer.step()

    with HostReads() as reads:
        torch.equal(torch.ones(1), torch.ones(1))
        read()
    line = read.__code__.co_firstlineno + 1
    assert [each for each in reads.found if each.line is not None] == [
        HostRead(f"{__file__}:{line}", "_local_scalar_dense", 1),
        HostRead(f"{__file__}:{line + 1}", "_unique2", 1),
    ]
    assert HostRead(None, "equal", 1) in reads.found
    assert HostRead(None, "_local_scalar_dense", 1) in reads.found


def event(name: str, start: float, end: float, device: str = "CPU") -> Any:
    """Return an event as torch's profiler reports it."""
    return SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=start, end=end), device_type=SimpleNamespace(name=device)
    )


def average(name: str, count: int, host_us: float, device_us: float = 0.0) -> Any:
    """Return the average of an operator as torch's profiler reports it."""
    return SimpleNamespace(key=name, count=count, self_cpu_time_total=host_us, self_device_time_total=device_us)


def profile_of(found: list[Any], averages: list[Any], *, on_accelerator: bool = False, seconds: float = 1e-3) -> Any:
    """Return the profile of one iteration with these events."""
    profiler = SimpleNamespace(events=lambda: found, key_averages=lambda: averages)
    return build_profile(
        profiler, rank=0, iterations=1, parts={"forward": seconds}, host_reads=(), trace="trace.json",
        run=ProfiledRun(num_workers=0, is_compiled=False, on_accelerator=on_accelerator),
    )  # fmt: skip


def test_communication_without_computation_is_exposed() -> None:
    """Of an all-reduce from 100 to 500 µs, operators cover 100 to 250 and 400 to 450, so 200 µs are exposed: 20 % of 1 ms."""
    found = profile_of(
        [event("aten::mm", 50, 250), event("gloo:all_reduce", 100, 500), event("aten::add", 400, 450)], []
    )
    (collective,) = found.collectives
    assert collective.seconds == pytest.approx(400e-6)
    assert collective.exposed_seconds == pytest.approx(200e-6)
    assert found.advice[0].startswith("For 20% of an iteration, the rank communicates without computing.")


def test_a_device_that_waits_for_small_kernels_is_a_case_for_the_compiler() -> None:
    """Fifty kernels of 4 µs in 1 ms leave the device idle for 80 % of the time."""
    kernels = [event("elementwise_kernel", 20 * index, 20 * index + 4, "CUDA") for index in range(50)]
    found = profile_of(kernels, [average("aten::mul", 50, 500, 200)], on_accelerator=True)
    assert found.device_seconds == pytest.approx(200e-6)
    (advice,) = found.advice
    assert advice == (
        "The device is idle for 80% of an iteration, and its 50 kernels take 4 µs on average: the host starts them too slowly. "
        "Set compile=True, which fuses operators, or use a larger batch."
    )


def test_many_small_operators_and_copies_are_reported_on_the_cpu() -> None:
    """200 operators of 4 µs are overhead, and copies of 300 µs are 30 % of the iteration."""
    found = profile_of(
        [event("aten::mul", index, index + 1) for index in range(200)],
        [average("aten::copy_", 50, 300), average("aten::mul", 150, 500)],
    )
    assert found.advice[0].startswith("The 200 operators of an iteration take 4 µs on average")
    assert found.advice[1].startswith("Copies of tensors take 30% of an iteration.")


def profile_on_rank(folder: str, *, profiled: bool) -> dict[str, Any]:
    """Train on this rank with DDP and accumulation; return the report and the weights."""
    hook = ProfilerHook(start=1, warmup=1, active=4)
    extra = [hook] if profiled else []
    changes = {"optim_wrapper": {**CLIPPED, "accumulative_counts": 2}, "train_cfg": {"max_epochs": 2}}
    runner = Runner(**settings(work_dir=folder, strategy="DDPStrategy", custom_hooks=extra, **changes))
    try:
        runner.train()
        weights: dict[str, Tensor] = runner.strategy.model_state_dict()
        report = None if hook.profile is None else hook.profile.as_dict()
        return {"report": report, "weights": {name: value.tolist() for name, value in weights.items()}}
    finally:
        runner.close()


def both_on_rank(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train with and without the profiler in one call, because starting a run on ranks takes seconds."""
    return profile_on_rank(f"{folder}/p", profiled=True), profile_on_rank(f"{folder}/w", profiled=False)


def test_each_rank_has_a_trace_with_its_collectives(tmp_path: Path, ranks: Ranks) -> None:
    """Both traces contain the all-reduces of gloo and all parts; the weights have the bits of a run without the profiler."""
    for rank, (profiled, without) in enumerate(ranks.run(both_on_rank, str(tmp_path))):
        assert profiled["weights"] == without["weights"]
        report = profiled["report"]
        assert Path(report["trace"]).name == f"rank{rank}.trace.json"
        names = [event["name"] for event in events(report["trace"])]
        # Four iterations with two micro-batches per step synchronize gradients twice.
        assert names.count("gloo:all_reduce") >= 2
        assert {"stratagem: forward", "stratagem: backward", "stratagem: clipping", "stratagem: data"} <= set(names)
        (collective,) = [each for each in report["collectives"] if each["name"] == "gloo:all_reduce"]
        assert 0 <= collective["exposed_seconds"] <= collective["seconds"]
