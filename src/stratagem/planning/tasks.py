"""The strategies that are planned, each at a number of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self, final

from stratagem.errors import ConfigKeyError, ConfigTypeError, StratagemError
from stratagem.planning.colossalai_plan import plan_colossalai
from stratagem.planning.deepspeed_plan import plan_deepspeed
from stratagem.planning.engines import EngineRequest
from stratagem.planning.result import MemoryPlan, StepPlan
from stratagem.planning.simulated import PlanRequest, plan_simulated
from stratagem.registry.strategy_names import require_strategy_name

__all__ = ["DEFAULT_STRATEGIES", "PlanAll", "PlanTask", "StrategySpec", "plan_in_turn", "tasks_for", "tasks_of"]

StrategySpec = str | Mapping[str, Any]

# The strategies that are compared by default, from the least to the most sharded. HSDP and tensor parallelism, whose options
# depend on the number of ranks, are added to them.
DEFAULT_STRATEGIES: Final[tuple[StrategySpec, ...]] = (
    "single",
    "ddp",
    "fsdp",
    {"type": "fsdp", "reshard_after_forward": False},
    {"type": "fsdp", "mixed_precision": "bfloat16"},
    {"type": "fsdp", "mixed_precision": "bfloat16", "activation_checkpointing": True},
    {"type": "fsdp", "cpu_offload": True},
    *({"type": "deepspeed", "zero_optimization": {"stage": stage}, "bf16": True} for stage in range(4)),
    *(
        {"type": "colossalai", "plugin": {"type": "lowlevel-zero", "stage": stage}, "mixed_precision": "bf16"}
        for stage in (1, 2)
    ),
)
# The largest number of ranks that the layers of a model are sharded across by default.
_MOST_TENSOR_PARALLEL: Final = 8
# Options whose values are clear without the key.
_SELF_EXPLANATORY: Final = frozenset({"type", "plugin", "mixed_precision"})
_ENGINES: Final = {"DeepSpeedStrategy": plan_deepspeed, "ColossalAIStrategy": plan_colossalai}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTask:
    """A strategy at a number of ranks.

    Attributes:
        strategy: the full name of the strategy.
        options: the other options of the configuration.
        world: the number of ranks.
    """

    strategy: str
    options: Mapping[str, Any]
    world: int

    @classmethod
    def of(cls, strategy: StrategySpec, world: int) -> Self:
        """Return the task of a name or a configuration.

        Raises:
            ConfigKeyError: if the configuration has no type, or if its name is unknown.
            ConfigTypeError: if it is neither a name nor a configuration.
        """
        if not isinstance(strategy, str | Mapping):
            raise ConfigTypeError(
                f"Planning creates the strategy for each number of ranks, so it needs its name or its configuration, such as "
                f"dict(type='fsdp'), instead of an object of the class {type(strategy).__name__}."
            )
        own: dict[str, Any] = {"type": strategy} if isinstance(strategy, str) else dict(strategy)
        kind = own.pop("type", None)
        if kind is None:
            raise ConfigKeyError(f"strategy: {own} has no key 'type'. Example: dict(type='fsdp').")
        name = require_strategy_name(kind) if isinstance(kind, str) else str(kind.__name__)
        return cls(strategy=name, options=own, world=world)

    @property
    def label(self) -> str:
        """The name with the options, in a short form."""
        short = self.strategy.removesuffix("Strategy").removesuffix("Device")
        return " ".join([short, *_words(self.options)])

    @property
    def is_engine(self) -> bool:
        """Whether an engine trains; engines of one precision share their simulation."""
        return self.strategy in _ENGINES

    def plan(self, request: PlanRequest) -> list[StepPlan]:
        """Return a plan for each memory limit."""
        start = time.process_time()
        base = StepPlan(
            label=self.label,
            strategy=self.strategy,
            options=self.options,
            world=self.world,
            gpus_per_node=request.ranks_per_node,
            dp_size=self.world,
            micro_batch=None if request.batch is None else request.batch.size,
            accumulation=1,
            memory=MemoryPlan(parameters=0, gradients=0, optimizer_state=0),
        )
        try:
            if self.is_engine:
                planned = _plan_engine(request, base)
            else:
                planned = plan_simulated(request, {**self.options, "type": self.strategy}, base)
        except StratagemError as error:
            planned = [replace(base, memory_limit=limit, refusal=str(error)) for limit in request.memory_limits]
        except Exception as error:  # noqa: BLE001 -- of the optimizer or the model, as at the start of a training
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0]}"
            planned = [replace(base, memory_limit=limit, refusal=reason) for limit in request.memory_limits]
        return [replace(each, seconds=time.process_time() - start) for each in planned]


# Returns the plans of each task, in the order of the tasks.
PlanAll = Callable[[PlanRequest, Sequence[PlanTask]], Iterable[list[StepPlan]]]


def plan_in_turn(request: PlanRequest, tasks: Sequence[PlanTask]) -> Iterator[list[StepPlan]]:
    """Yield the plans of each task."""
    return (task.plan(request) for task in tasks)


def tasks_of(strategies: Sequence[StrategySpec] | None, worlds: Sequence[int]) -> Iterator[PlanTask]:
    """Yield each strategy with each number of ranks; without strategies, that of a run without any."""
    if not strategies:
        yield from (PlanTask.of("single" if world == 1 else "ddp", world) for world in worlds)
        return
    for strategy in strategies:
        is_single = PlanTask.of(strategy, 1).strategy == "SingleDeviceStrategy"
        yield from (PlanTask.of(strategy, world) for world in ((1,) if is_single else worlds))


def tasks_for(world: int, ranks_per_node: int, *, has_plan: bool) -> Iterator[PlanTask]:
    """Yield the strategies of the default comparison whose options depend on the number of ranks."""
    half = {"mixed_precision": "bfloat16"}
    if world > ranks_per_node and world % ranks_per_node == 0:
        yield PlanTask.of({"type": "fsdp", "replicate": world // ranks_per_node, **half}, world)
    size = min(world, ranks_per_node, _MOST_TENSOR_PARALLEL)
    if has_plan and size > 1 and world % size == 0:
        yield PlanTask.of({"type": "fsdp", "tp": size, **half}, world)
        plugin = {"type": "hybrid-parallel", "tp_size": size}
        yield PlanTask.of({"type": "colossalai", "plugin": plugin, "mixed_precision": "bf16"}, world)


def _plan_engine(request: PlanRequest, base: StepPlan) -> list[StepPlan]:
    own = EngineRequest(
        job=request.job, timelines=request.timelines, limits=request.memory_limits, average=request.average
    )
    return _ENGINES[base.strategy](own, base)


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield short forms of options: names and dtypes without their key, and the options of sections without the section."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from [key] if value == {"enabled": True} else _words(value)
        elif value is True:
            yield key
        else:
            yield str(value) if key in _SELF_EXPLANATORY and isinstance(value, str) else f"{key}={value}"
