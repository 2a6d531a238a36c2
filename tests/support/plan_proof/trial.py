"""Run a case on ranks and plan it, and compare both."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from stratagem import Runner
from stratagem.config_schema import SECTIONS
from stratagem.planning.planner import plan_config
from stratagem.planning.result import StepPlan
from stratagem.utils import import_object
from tests.support.plan_proof.jobs import Case, case_named, config_of
from tests.support.plan_proof.witness import Measurement, WitnessHook, bytes_key

__all__ = ["STATIC", "Comparison", "compare", "measured", "planned"]

STATIC: Final = ("parameters", "gradients", "optimizer_state", "master_weights", "ema", "buffers", "batch")


def measured(model: str, name: str, folder: str) -> Measurement:
    """Train some steps of a case on this rank with ``Runner``; return the sizes, collectives and operations of a step."""
    case = case_named(name)
    if case.strategy.get("fp16"):
        import_object("tests.engines.deepspeed.engine_runs:allow_float16")()
    config = config_of(model, case)
    hook = WitnessHook(case.accumulation)
    for unused in ("val_dataloader", "val_cfg", "val_evaluator", "test_dataloader", "test_cfg", "test_evaluator"):
        config.pop(unused, None)
    with warnings.catch_warnings():
        # Of torch's profiler, and of transformers and timm.
        warnings.simplefilter("ignore")
        settings = {
            "work_dir": folder,
            "log_level": "ERROR",
            "default_hooks": {"checkpoint": None},
            "train_cfg": {"max_iters": WitnessHook.STEPS * case.accumulation},
            "custom_hooks": [*(config.get("custom_hooks") or ()), hook],
            "param_scheduler": None,
        }
        # Without the variables of the file, which are unknown keys in a dictionary.
        sections = {key: value for key, value in config.items() if key in SECTIONS}
        runner = Runner.from_cfg({**sections, **settings})
        try:
            runner.train()
        finally:
            runner.close()
    return hook.found


def planned(model: str, case: Case, world: int) -> StepPlan:
    """Return the plan of a case."""
    config = config_of(model, case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        [step] = plan_config(config, worlds=(world,)).steps
    return step


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A plan and what ranks measured.

    Attributes:
        model: the name of the model.
        case: the case.
        world: the number of ranks.
        static: for each static size, the planned bytes and those of the rank with the most.
        activations: the planned and measured bytes.
        peak: the same.
        allocator_peak: what the allocator gave at most, with memory that kernels use internally.
        collectives: the planned and measured number of collectives of each kind, and the bytes of a rank.
        flops: the planned and measured number of operations.
        problem: why nothing was planned.
    """

    model: str
    case: Case
    world: int
    static: Mapping[str, tuple[int, int]]
    activations: tuple[int, int]
    peak: tuple[int, int]
    allocator_peak: int
    collectives: Mapping[str, tuple[int, int]]
    flops: tuple[int, int]
    problem: str | None = None

    @property
    def different(self) -> list[str]:
        """What must be equal, or within 5 %, and is not."""
        found = [f"{name}: {plan} planned, {real} real" for name, (plan, real) in self.static.items() if plan != real]
        found += [
            f"{kind}: {plan} planned, {real} real" for kind, (plan, real) in self.collectives.items() if plan != real
        ]
        found += (
            [] if self.flops[0] == self.flops[1] else [f"operations: {self.flops[0]} planned, {self.flops[1]} real"]
        )
        for name, (plan, real) in (("activations", self.activations), ("peak", self.peak)):
            if abs(plan - real) > 0.05 * real:
                found.append(f"{name}: {plan} planned, {real} real, {_percent(plan, real)}")
        return [*([self.problem] if self.problem else []), *found]


def _percent(plan: int, real: int) -> str:
    return f"{100 * (plan / real - 1):+.1f} %" if real else "-"


def compare(model: str, case: Case, world: int, real: Sequence[Measurement]) -> Comparison:
    """Plan a case, and compare the plan with the measurements of all ranks."""
    step = planned(model, case, world)
    memory = step.memory
    host = memory.host
    static = {name: getattr(memory, name) + host.get(name.replace("_", " "), 0) for name in STATIC}
    # With FSDP, gradients do not exist at the peak; DeepSpeed keeps a buffer for them.
    always = ("parameters", "optimizer_state", *(("gradients", "master_weights") if "master weights" in host else ()))
    on_host = sum(host.get(name.replace("_", " "), 0) for name in (*always, "copies for updates"))
    sent, seen = _sent(step), real[0]["collectives"]
    return Comparison(
        model=model,
        case=case,
        world=world,
        static={name: (size, max(each[name] for each in real)) for name, size in static.items()},
        activations=(memory.activations or 0, real[0]["activations"]),
        peak=((memory.peak or 0) + on_host, real[0]["peak"]),
        allocator_peak=real[0]["allocator_peak"],
        collectives={kind: (sent.get(kind, 0), seen.get(kind, 0)) for kind in sorted({*sent, *seen})},
        flops=(step.flops or 0, real[0]["flops"]),
        problem=step.refusal or step.failure,
    )


def _sent(step: StepPlan) -> dict[str, int]:
    """Return the number of planned collectives by kind, and the bytes that a rank contributes to them."""
    found: Counter[str] = Counter()
    for each in step.collectives:
        found[each.kind] += each.count
        found[bytes_key(each.kind)] += each.bytes // each.group_size if each.kind == "all_gather" else each.bytes
    return dict(found)
