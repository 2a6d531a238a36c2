"""Plan a model or a configuration under several strategies and at several numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stratagem.config import Config
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.optim import OptimSpec
from stratagem.parallel.deferred_init.recorder import OpRecorder
from stratagem.planning.batch import BatchSpec, describe_batch, first_batch, parse_batch, without_network
from stratagem.planning.model_copies import ModelCopies, meta_copy
from stratagem.planning.repeated_blocks import BlockFinder
from stratagem.planning.result import ModelFacts, Plan
from stratagem.planning.simulate import Job
from stratagem.planning.simulated import PlanRequest
from stratagem.planning.tasks import DEFAULT_STRATEGIES, PlanAll, StrategySpec, plan_in_turn, tasks_for, tasks_of
from stratagem.planning.timelines import Timelines
from stratagem.registry import HOOKS, switch_scope
from stratagem.strategies.setup.building import build_model, with_preprocessor
from stratagem.train.hooks.averaging import EMAHook

__all__ = ["model_factory", "plan", "plan_config", "requested"]


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
        ConfigTypeError: if the model has no ``train_step``, or if an argument is not a list.
        ConfigKeyError: if a strategy is unknown.
        ConfigValueError: if an argument is invalid.
    """
    if not callable(getattr(model, "train_step", None)):
        raise ConfigTypeError(
            f"{type(model).__name__} has no train_step. Wrap it, as for training: SupervisedModel(model, loss) or "
            "ModelWithLoss(model)."
        )
    if not optim_wrapper:
        raise ConfigValueError(
            "Planning requires an optim_wrapper, such as dict(optimizer=dict(type='AdamW', lr=1e-3))."
        )
    spec = parse_batch(batch) if isinstance(batch, str) else None if batch is None else BatchSpec.of(batch)
    job = Job(make_model=lambda: meta_copy(model), optim_wrapper=optim_wrapper)
    request = _request(job, spec, strategies, gpus_per_node, memory, None)
    return _plan(request, strategies, worlds, plan_in_turn)


def plan_config(
    config: Config,
    *,
    strategies: Sequence[StrategySpec] | None = None,
    worlds: Sequence[int] = (8,),
    gpus_per_node: int = 8,
    memory: int | Sequence[int] | None = None,
    batch: str | None = None,
    plan_all: PlanAll = plan_in_turn,
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
        plan_all: plans the strategies, by default one after the other.

    Raises:
        ConfigError: (or a subclass) if a section is missing or invalid.
        StateError: if building the model or reading the data needs the network.
    """
    if not strategies and config.get("strategy") is not None:
        strategies = [config["strategy"]]
    spec = None if batch is None else parse_batch(batch)
    with requested(config, spec, strategies=strategies, gpus_per_node=gpus_per_node, memory=memory) as request:
        return _plan(request, strategies, worlds, plan_all)


@contextmanager
def requested(
    config: Config,
    batch: BatchSpec | None,
    *,
    strategies: Sequence[StrategySpec] | None,
    gpus_per_node: int,
    memory: int | Sequence[int] | None,
) -> Iterator[PlanRequest]:
    """Yield what a configuration asks to plan, in the scope of its registries; for the arguments, see :func:`plan_config`.

    Raises:
        ConfigError: (or a subclass) if a section is missing or invalid.
        StateError: if building the model or reading the data needs the network.
    """
    for section in ("model", "optim_wrapper"):
        if config.get(section) is None:
            raise ConfigValueError(f"Planning requires the section {section!r} in the configuration.")
    with switch_scope(config.get("default_scope")):
        if batch is None and config.get("train_dataloader") is not None:
            batch = first_batch(config["train_dataloader"])
        job = Job(
            make_model=ModelCopies(model_factory(with_preprocessor(config["model"], config.get("data_preprocessor")))),
            optim_wrapper=config["optim_wrapper"],
            randomness=config.get("randomness"),
        )
        yield _request(job, batch, strategies, gpus_per_node, memory, _averaging_hook(config))


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


def _plan(
    request: PlanRequest, strategies: Sequence[StrategySpec] | None, worlds: Sequence[int], plan_all: PlanAll
) -> Plan:
    if isinstance(worlds, int | str):
        raise ConfigTypeError(f"worlds must be a list of numbers of ranks, such as [8, 64], got {worlds!r}.")
    for world in worlds:
        if not _is_count(world):
            raise ConfigValueError(f"A number of ranks must be an integer >= 1, got {world!r}.")
    tasks = list(tasks_of(strategies, worlds))
    facts = _facts(request)
    if strategies is DEFAULT_STRATEGIES:
        has_plan = bool(getattr(request.job.make_model(), "tp_plan", None))
        tasks += [task for world in worlds for task in tasks_for(world, request.ranks_per_node, has_plan=has_plan)]
    return Plan(model=facts, steps=tuple(step for steps in plan_all(request, tasks) for step in steps))


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


def _request(
    job: Job,
    batch: BatchSpec | None,
    strategies: Sequence[StrategySpec] | None,
    ranks_per_node: int,
    memory: int | Sequence[int] | None,
    average: EMAHook | None,
) -> PlanRequest:
    if isinstance(strategies, str | Mapping):
        raise ConfigTypeError(f"strategies must be a list of names or configurations, got {strategies!r}.")
    if not _is_count(ranks_per_node):
        raise ConfigValueError(f"gpus_per_node must be an integer >= 1, got {ranks_per_node!r}.")
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
    limits = (memory,) if memory is None or isinstance(memory, int | str | float) else tuple(memory) or (None,)
    for limit in limits:
        if limit is not None and not _is_count(limit):
            raise ConfigValueError(f"memory must be a number of bytes >= 1, such as 80 * 2**30, got {limit!r}.")
    return limits


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
