"""A model, its optimizer and how they train, as ColossalAI's Booster makes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast, final

from colossalai.booster import Booster
from colossalai.booster.plugin import HybridParallelPlugin, Plugin
from colossalai.interface import ModelWrapper, OptimizerWrapper
from colossalai.logging import get_dist_logger
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from stratagem.checkpoint import parameter_names
from stratagem.distributed import World
from stratagem.engines.colossalai.clipping import max_norm_of
from stratagem.engines.colossalai.cpu_backend import train_on_cpu
from stratagem.engines.colossalai.optimizers import WHOLE_PARAMETERS
from stratagem.engines.colossalai.options import PluginSpec
from stratagem.engines.colossalai.plugins import PluginTraits, build_plugin, traits_of
from stratagem.engines.colossalai.shard_layout import ParamShard, param_shards
from stratagem.engines.colossalai.wrapper import ColossalAIOptimWrapper
from stratagem.engines.engine_module import EngineModule
from stratagem.errors import NotPreparedError, PlacementError
from stratagem.model import is_model_wrapper
from stratagem.optim import AccumulatingOptimWrapper, OptimWrapper
from stratagem.optim.gradient_policy import NO_CONTEXT, GradientPolicy
from stratagem.parallel import AnyOptim, Placed, Placement, Steps
from stratagem.parallel.local_gradients import LocalGradients

__all__ = ["BoostedModel", "ColossalAIPlacement"]

_NO_MODEL: Final = "There is no model yet. Call prepare(model, ...) first."


@final
@dataclass(frozen=True, slots=True)
class BoostedModel:
    """What the booster made of a model: it wrapped, and its optimizer where there is one."""

    booster: Booster
    model: nn.Module
    engine: ModelWrapper
    optimizer: OptimizerWrapper | None


@final
class ColossalAIPlacement(Placement):
    """Places a model through a plugin of ColossalAI.

    Args:
        plugin: which plugin, still to be built, or a built one.
        world: what is true of this process.

    Raises:
        PlacementError: if the plugin cannot work here.
    """

    sharded = True
    has_gradients = False
    params_are_master_weights = True
    params_accept_writes = True

    def __init__(self, plugin: PluginSpec | Plugin, world: World) -> None:
        # It writes to the terminal by itself, and tells at length what it does.
        get_dist_logger().set_level("WARNING")
        # What it warns of in a step: collectives and storages that have newer names.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning, module=r"colossalai\.")
        if world.device.type == "cpu":
            train_on_cpu()
        self._plugin = plugin
        self._tp_size = plugin.tp_size if isinstance(plugin, PluginSpec) else traits_of(plugin).tp_size
        if world.size % self._tp_size:
            raise PlacementError(
                f"plugin: tp_size={self._tp_size} does not divide the {world.size} processes of this run."
            )
        self._boosted_model: BoostedModel | None = None
        self._param_shards: dict[nn.Parameter, ParamShard] | None = None
        # Of the optimizer as it was built: the booster's may have left out those that do not learn.
        self.group_names: list[list[str]] = []
        self._dp_group: ProcessGroup | None = None
        self._hold: Callable[[], AbstractContextManager[object]] = nullcontext
        # Of plugins that use DistributedDataParallel.
        self._local_gradients: LocalGradients | None = None

    @property
    def uses_tensor_parallel(self) -> bool:
        """Whether ranks have param_shards of layers (tensor parallel)."""
        return self._tp_size > 1

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer has the parameters in another type than they are computed with."""
        return any(shard.master.dtype != shard.working.dtype for shard in self.param_shards.values())

    @property
    def param_shards(self) -> dict[nn.Parameter, ParamShard]:
        """What this rank has of each parameter of the model that was placed."""
        if self._param_shards is None:
            raise NotPreparedError(_NO_MODEL)
        return self._param_shards

    @property
    def boosted(self) -> BoostedModel:
        """The booster with what it made of the model that was placed."""
        if self._boosted_model is None:
            raise NotPreparedError(_NO_MODEL)
        return self._boosted_model

    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        if is_model_wrapper(model):
            raise PlacementError(
                f"The model is wrapped already, in a {type(model).__name__}; give the strategy the bare model: it wraps it."
            )
        model = steps.compile(steps.init_and_sync(model).to(world.device))
        if "train_step" in vars(model):
            raise PlacementError(
                "compile: target='train_step' cannot be used with ColossalAI, which it would leave out. Compile "
                "target='forward'."
            )
        settings = None if steps.make_optim is None else _settings(steps.make_optim(model))
        plugin, traits = self._build(model, settings, world)
        _refuse_model(model, traits, world)
        if settings is not None and traits.zero_stage:
            _refuse_optimizer(settings)
        if settings is not None:
            self.group_names = parameter_names(settings.optimizer, model)
        booster = Booster(plugin=plugin)
        with warnings.catch_warnings():
            # Of options of torch that have newer names, which the library does not know.
            warnings.simplefilter("ignore")
            engine, optimizer, *_ = booster.boost(model, None if settings is None else settings.optimizer)
        self._boosted_model = BoostedModel(booster, model, engine, optimizer)
        self._param_shards = param_shards(model, optimizer)
        # Hooks that read or write weights in the model need them there whole, and as they are trained.
        self.params_are_master_weights = not self.has_masters and not self.uses_tensor_parallel
        self.params_accept_writes = all(shard.master is shard.working for shard in self._param_shards.values())
        if isinstance(plugin, HybridParallelPlugin) and traits.tp_size > 1:
            self._dp_group = plugin.dp_group
        if settings is None:
            return Placed(model=_driven(engine, model))
        if traits.zero_stage < 2:
            # With stage 2 a rank keeps its shard of the gradients alone, so they are exchanged after each micro-batch.
            self._hold = partial(booster.no_sync, engine, optimizer)
            # Those of float16 are scaled, and those of a spread layer are no whole tensors.
            self.has_gradients = traits.precision != "fp16" and traits.tp_size == 1
        optim = ColossalAIOptimWrapper(
            optimizer,
            self._param_shards,
            settings,
            hold=self._hold,
            clipping=None if traits.clips else settings.clipping,
            norm_is_logged=traits.max_norm > 0,
            reduces_in_backward=traits.zero_stage > 0,
        )
        if isinstance(engine.module, DistributedDataParallel):
            self._local_gradients = LocalGradients.of(engine.module)
        return Placed(model=_driven(engine, model), optim=optim)

    def _build(
        self, model: nn.Module, settings: AccumulatingOptimWrapper | None, world: World
    ) -> tuple[Plugin, PluginTraits]:
        """Return the plugin, with the clipping that the optimizer wrapper asks for, and what it does."""
        clipping = None if settings is None else settings.clipping
        if isinstance(self._plugin, PluginSpec):
            spec = self._plugin
            if spec.clips:
                spec = spec.with_options(max_norm=max_norm_of(clipping, spec.options.get("max_norm", 0.0)))
            plugin = build_plugin(spec, model, world.device)
            return plugin, traits_of(plugin)
        traits = traits_of(self._plugin)
        if traits.clips and max_norm_of(clipping, traits.max_norm) != traits.max_norm:
            raise PlacementError(
                f"clip_grad of the optimizer wrapper is for the plugin, which is built already. Build it with "
                f"max_norm={max_norm_of(clipping, traits.max_norm):g}."
            )
        return self._plugin, traits

    def dp_rank(self, world: World) -> int:
        return world.rank // self._tp_size

    def dp_size(self, world: World) -> int:
        return world.size // self._tp_size

    @property
    def dp_group(self) -> ProcessGroup | None:
        return self._dp_group

    def bind(self, optim: AnyOptim, model: nn.Module) -> None:
        if not isinstance(optim, ColossalAIOptimWrapper):
            raise PlacementError(
                "ColossalAI boosts a model and its optimizer together, and this model was prepared without one. Give "
                "optim_wrapper to the first prepare, or train in a new process."
            )

    def gradient_policy(self, model: nn.Module, *, accumulates: bool) -> GradientPolicy:
        return GradientPolicy(
            sync_context=self._sync_context,
            always_set_grad_sync=accumulates,
            complete=None if self._local_gradients is None else self._local_gradients.complete,
        )

    def _sync_context(self, model: nn.Module, sync: bool) -> AbstractContextManager[object]:
        return NO_CONTEXT if sync else self._hold()

    def note_restored_gradients(self, model: nn.Module) -> None:
        if self._local_gradients is not None:
            self._local_gradients.missed = True

    def global_numel(self, parameter: nn.Parameter) -> int:
        return self.param_shards[parameter].shape.numel()

    def unwrap(self, model: nn.Module) -> nn.Module:
        return cast("nn.Module", model.bare) if isinstance(model, EngineModule) else model


def _driven(engine: ModelWrapper, bare: nn.Module) -> EngineModule:
    """Have a model train through ColossalAI, and be evaluated by itself.

    Nothing is exchanged between replicas then, so ranks may have different numbers of batches.
    """
    # What a plugin does to floating-point inputs.
    convert = getattr(engine, "convert_fn", None)

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        if convert is not None:
            args, kwargs = tree_map(convert, args), tree_map(convert, kwargs)
        return bare(*args, **kwargs)

    return EngineModule(bare, engine, engine="ColossalAI", training_forward=engine, eval_forward=evaluate)


def _settings(built: AnyOptim) -> OptimWrapper:
    """Return what was configured, which the engine's own wrapper then does.

    Raises:
        PlacementError: if it is something that ColossalAI cannot do.
    """
    if isinstance(built, OptimWrapper):
        return built
    instead = {
        "AmpOptimWrapper": "Precision is the plugin's: use OptimWrapper and ColossalAIStrategy(mixed_precision='bf16')",
        "OptimWrapperDict": "ColossalAI boosts one optimizer. Use DDPStrategy for a model with several",
    }.get(type(built).__name__, "Use OptimWrapper, in whose place the strategy puts the engine's own")
    raise PlacementError(f"ColossalAIStrategy cannot train with a {type(built).__name__}. {instead}.")


def _refuse_model(model: nn.Module, traits: PluginTraits, world: World) -> None:
    # The plugins that use DistributedDataParallel turn these into SyncBatchNorm by themselves.
    replicates = not traits.clips or not traits.zero_stage
    if world.device.type == "cpu" and replicates and any(isinstance(each, _BatchNorm) for each in model.modules()):
        raise PlacementError(
            "This plugin turns BatchNorm into SyncBatchNorm, which works on accelerators alone, and this run is on the CPU. "
            "Use plugin='lowlevel-zero', which leaves it, or a normalisation that does not look at the batch."
        )


def _refuse_optimizer(settings: OptimWrapper) -> None:
    name = type(settings.optimizer).__name__
    if name in WHOLE_PARAMETERS:
        raise PlacementError(
            f"{name} looks at whole parameters, or keeps state of them, and under ZeRO each rank updates a range of each. Use "
            "plugin='torch-ddp', or an optimizer that works on each element by itself, such as AdamW."
        )
