"""Plan a model or a configuration under several strategies and at several numbers of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from stratagem.config import Config
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, StratagemError
from stratagem.optim import OptimSpec
from stratagem.parallel.deferred_init.recorder import OpRecorder
from stratagem.planning.batch import BatchSpec, describe_batch, first_batch, parse_batch, without_network
from stratagem.planning.colossalai_plan import plan_colossalai
from stratagem.planning.deepspeed_plan import plan_deepspeed
from stratagem.planning.engines import EngineRequest
from stratagem.planning.model_copies import ModelCopies, meta_copy
from stratagem.planning.repeated_blocks import BlockFinder
from stratagem.planning.result import MemoryPlan, ModelFacts, Plan, StepPlan
from stratagem.planning.simulate import Job
from stratagem.planning.simulated import PlanRequest, plan_simulated
from stratagem.planning.timelines import Timelines
from stratagem.registry import HOOKS, switch_scope
from stratagem.registry.strategy_names import full_strategy_name, require_strategy_name
from stratagem.strategies.setup.building import build_model, with_preprocessor
from stratagem.train.hooks.averaging import EMAHook

__all__ = ["DEFAULT_STRATEGIES", "StrategySpec", "model_factory", "plan", "plan_config"]

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


def plan(
    model: nn.Module,
    *,
    optim_wrapper: OptimSpec,
    batch: Any = None,
    strategies: Sequence[StrategySpec] = DEFAULT_STRATEGIES,
    worlds: Sequence[int] = (8,),
    gpus_per_node: int = 8,
    memory: int | Sequence[int] | None = None,
) -> Plan:
    """Plan the training of a module. The module is not changed, and no memory is allocated for copies of it.

    Args:
        model: a module with ``train_step``, such as a ``BaseModel``; it may be on the meta device.
        optim_wrapper: the configuration of the optimizer wrapper.
        batch: a batch, whose values do not matter, or a description such as ``"tokens=int64[8,1024]"``. Without a batch, only
            static sizes are computed.
        strategies: names or configurations of strategies.
        worlds: the numbers of ranks.
        gpus_per_node: the number of ranks on a node.
        memory: the memory of a device in bytes, for the search for the largest micro-batch. With several values, each gets its
            own plan.

    Raises:
        ConfigTypeError: if the model has no ``train_step``.
        ConfigKeyError: if a strategy is unknown.
        ConfigValueError: if an argument is invalid.
    """
    if not callable(getattr(model, "train_step", None)):
        raise ConfigTypeError(
            f"{type(model).__name__} has no train_step. Wrap it, as for training: SupervisedModel(model, loss) or "
            "ModelWithLoss(model)."
        )
    spec = parse_batch(batch) if isinstance(batch, str) else None if batch is None else BatchSpec.of(batch)
    job = Job(make_model=lambda: meta_copy(model), optim_wrapper=optim_wrapper)
    request = _request(job, spec, strategies, gpus_per_node, memory, None)
    return _plan(request, strategies, worlds)


def plan_config(
    config: Config,
    *,
    strategies: Sequence[StrategySpec] | None = None,
    worlds: Sequence[int] = (8,),
    gpus_per_node: int = 8,
    memory: int | Sequence[int] | None = None,
    batch: str | None = None,
) -> Plan:
    """Plan the training that a configuration describes.

    The model is built on the meta device. The batch is the first one of the training data, unless ``batch`` describes it.

    Args:
        config: the configuration.
        strategies: names or configurations of strategies; by default that of the configuration, and if it has none, DDP for
            several ranks and a single device for one rank.
        worlds: the numbers of ranks.
        gpus_per_node: the number of ranks on a node.
        memory: the memory of a device in bytes, for the search for the largest micro-batch. With several values, each gets its
            own plan.
        batch: a description of the batch, such as ``"tokens=int64[8,1024]"``.

    Raises:
        ConfigError: (or a subclass) if a section is missing or invalid.
        StateError: if building the model or reading the data needs the network.
    """
    for section in ("model", "optim_wrapper"):
        if config.get(section) is None:
            raise ConfigValueError(f"Planning requires the section {section!r} in the configuration.")
    with switch_scope(config.get("default_scope")):
        spec = parse_batch(batch) if batch is not None else None
        if spec is None and config.get("train_dataloader") is not None:
            spec = first_batch(config["train_dataloader"])
        job = Job(
            make_model=ModelCopies(model_factory(with_preprocessor(config["model"], config.get("data_preprocessor")))),
            optim_wrapper=config["optim_wrapper"],
            randomness=config.get("randomness"),
        )
        request = _request(job, spec, strategies, gpus_per_node, memory, _averaging_hook(config))
        if not strategies and config.get("strategy") is not None:
            strategies = [config["strategy"]]
        return _plan(request, strategies, worlds)


def model_factory(model: Any) -> Callable[[], nn.Module]:
    """Return a function that builds a model on the meta device."""
    if isinstance(model, nn.Module):
        return lambda: meta_copy(model)

    def build() -> nn.Module:
        with without_network("The model", "Set the option of the model that loads pretrained weights to False."):
            try:
                with OpRecorder().recording():
                    return build_model(model)
            except (NotImplementedError, RuntimeError) as error:
                if "meta" not in str(error).lower():
                    raise
            # The constructor reads values of tensors.
            return meta_copy(build_model(model))

    return build


def _averaging_hook(config: Config) -> EMAHook | None:
    """Return the hook of the configuration that averages the weights; None if there is none."""
    for section in config.get("custom_hooks") or ():
        kind = section.get("type") if isinstance(section, Mapping) else None
        if (HOOKS.get(kind) if isinstance(kind, str) else kind) is EMAHook:
            built: EMAHook = HOOKS.build(section)
            return built
        if isinstance(section, EMAHook):
            return section
    return None


def _plan(request: PlanRequest, strategies: Sequence[StrategySpec] | None, worlds: Sequence[int]) -> Plan:
    for world in worlds:
        if isinstance(world, bool) or not isinstance(world, int) or world < 1:
            raise ConfigValueError(f"A number of ranks must be an integer >= 1, got {world!r}.")
    jobs = [(own, _name(own), world) for own, world in _jobs(strategies, worlds)]
    facts = _facts(request)
    steps = []
    for own, name, world in jobs:
        steps += _plan_step(request, own, name, world)
    if strategies is DEFAULT_STRATEGIES:
        has_plan = bool(getattr(request.job.make_model(), "tp_plan", None))
        for world in worlds:
            for own in _strategies_for(world, request.ranks_per_node, has_plan=has_plan):
                steps += _plan_step(request, own, full_strategy_name(own["type"]), world)
    return Plan(model=facts, steps=tuple(steps))


def _jobs(strategies: Sequence[StrategySpec] | None, worlds: Sequence[int]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the configuration of each strategy with each number of ranks; without strategies, that of a run without any."""
    if not strategies:
        yield from (({"type": "single" if world == 1 else "ddp"}, world) for world in worlds)
        return
    for strategy in strategies:
        if not isinstance(strategy, str | Mapping):
            raise ConfigTypeError(
                f"Planning creates the strategy for each number of ranks, so it needs its name or its configuration, such as "
                f"dict(type='fsdp'), instead of an object of the class {type(strategy).__name__}."
            )
        own: dict[str, Any] = {"type": strategy} if isinstance(strategy, str) else dict(strategy)
        is_single = _name(own) == "SingleDeviceStrategy"
        yield from ((own, world) for world in ((1,) if is_single else worlds))


def _name(strategy: Mapping[str, Any]) -> str:
    """Return the name of the class of a strategy, given its configuration.

    Raises:
        ConfigKeyError: if the configuration has no type, or if its name is unknown.
    """
    kind = strategy.get("type")
    if kind is None:
        raise ConfigKeyError(f"strategy: {dict(strategy)} has no key 'type'. Example: dict(type='fsdp').")
    return require_strategy_name(kind) if isinstance(kind, str) else str(kind.__name__)


def _strategies_for(world: int, ranks_per_node: int, *, has_plan: bool) -> list[dict[str, Any]]:
    """Return the strategies of the default comparison whose options depend on the number of ranks."""
    found: list[dict[str, Any]] = []
    half = {"mixed_precision": "bfloat16"}
    if world > ranks_per_node and world % ranks_per_node == 0:
        found.append({"type": "fsdp", "replicate": world // ranks_per_node, **half})
    size = min(world, ranks_per_node, _MOST_TENSOR_PARALLEL)
    if has_plan and size > 1 and world % size == 0:
        found.append({"type": "fsdp", "tp": size, **half})
        plugin = {"type": "hybrid-parallel", "tp_size": size}
        found.append({"type": "colossalai", "plugin": plugin, "mixed_precision": "bf16"})
    return found


def _facts(request: PlanRequest) -> ModelFacts:
    model = request.job.make_model()
    parameters = list(model.parameters())
    return ModelFacts(
        name=type(model).__name__,
        parameters=sum(each.numel() for each in parameters),
        trainable=sum(each.numel() for each in parameters if each.requires_grad),
        parameter_bytes=sum(each.nbytes for each in parameters),
        buffer_bytes=sum(each.nbytes for each in model.buffers()),
        batch=() if request.batch is None else describe_batch(request.batch.batch),
        batch_source="no batch was given" if request.batch is None else request.batch.source,
    )


def _plan_step(request: PlanRequest, strategy: Mapping[str, Any], name: str, world: int) -> list[StepPlan]:
    """Return a plan for each memory limit."""
    start = time.process_time()
    options = {key: value for key, value in strategy.items() if key != "type"}
    base = StepPlan(
        label=_label(name, options),
        strategy=name,
        options=options,
        world=world,
        gpus_per_node=request.ranks_per_node,
        dp_size=world,
        micro_batch=None if request.batch is None else request.batch.size,
        accumulation=1,
        memory=MemoryPlan(parameters=0, gradients=0, optimizer_state=0),
    )
    try:
        if name in _ENGINES:
            return _plan_engine(request, base, start)
        planned = plan_simulated(request, {**strategy, "type": name}, base)
    except StratagemError as error:
        planned = [replace(base, memory_limit=limit, refusal=str(error)) for limit in request.memory_limits]
    except Exception as error:  # noqa: BLE001 -- of the optimizer or the model, as at the start of a training
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"
        planned = [replace(base, memory_limit=limit, refusal=reason) for limit in request.memory_limits]
    return [replace(each, seconds=time.process_time() - start) for each in planned]


def _plan_engine(request: PlanRequest, base: StepPlan, start: float) -> list[StepPlan]:
    own = EngineRequest(
        job=request.job, timelines=request.timelines, limits=request.memory_limits, average=request.average
    )
    return [replace(each, seconds=time.process_time() - start) for each in _ENGINES[base.strategy](own, base)]


def _request(
    job: Job,
    batch: BatchSpec | None,
    strategies: Sequence[StrategySpec] | None,
    ranks_per_node: int,
    memory: int | Sequence[int] | None,
    average: EMAHook | None,
) -> PlanRequest:
    # The engines of the default comparison compute in bfloat16.
    dtype = torch.bfloat16 if strategies is DEFAULT_STRATEGIES else None
    return PlanRequest(
        job=job,
        batch=batch,
        timelines=Timelines(job, batch, BlockFinder(job), dtype),
        ranks_per_node=ranks_per_node,
        memory_limits=_limits(memory),
        average=average,
    )


def _limits(memory: int | Sequence[int] | None) -> tuple[int | None, ...]:
    return (memory,) if memory is None or isinstance(memory, int) else tuple(memory) or (None,)


def _label(name: str, options: Mapping[str, Any]) -> str:
    short = name.removesuffix("Strategy").removesuffix("Device")
    return " ".join([short, *_words(options)])


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield short forms of options: names and dtypes without their key, and the options of sections without the section."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from [key] if value == {"enabled": True} else _words(value)
        elif value is True:
            yield key
        else:
            yield str(value) if key in _SELF_EXPLANATORY and isinstance(value, str) else f"{key}={value}"
