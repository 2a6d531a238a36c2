"""Wrap a model and its optimizer with ColossalAI's Booster."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
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
from stratagem.engines.colossalai.cpu_backend import train_on_cpu
from stratagem.engines.colossalai.options import (
    PluginSpec,
    max_norm_of,
    refuse_whole_parameters,
    require_plain_wrapper,
)
from stratagem.engines.colossalai.plugins import PluginTraits, build_plugin, plugin_traits
from stratagem.engines.colossalai.shard_layout import ParamShard, param_shards
from stratagem.engines.colossalai.wrapper import BoosterOptimWrapper
from stratagem.engines.engine_module import EngineModule, refuse_empty_parameters, refuse_trainable_change
from stratagem.errors import NotPreparedError, PlacementError
from stratagem.model import is_model_wrapper
from stratagem.model.replaced_layers import lost_by_replacement
from stratagem.optim import AccumulatingOptimWrapper
from stratagem.optim.gradient_policy import NO_CONTEXT, GradientPolicy
from stratagem.parallel import AnyOptim, Placed, Placement, Steps
from stratagem.parallel.gradient_hooks import GRADIENT_HOOKS, hooks_of_parameters, refuse_gradient_hooks
from stratagem.parallel.local_gradients import LocalGradients
from stratagem.parallel.trainable import TrainableChange
from stratagem.parallel.unused_parameters import unused_parameters_error
from stratagem.utils import named_parameters

__all__ = ["BoostedModel", "ColossalAIPlacement"]

_FIND_UNUSED: Final = "plugin=dict(type='torch-ddp', find_unused_parameters=True)"
_NO_HOOKS: Final = (
    "ColossalAI's tensor parallelism shards or replaces this parameter, so the hook would get the gradient of a shard as a plain "
    "tensor. Exclude the layer from the tensor-parallel policy or plan, or use FSDPStrategy(tp=...), where hooks from "
    "register_post_accumulate_grad_hook get a DTensor."
)
_NO_MODEL: Final = "The model has not been prepared yet. Call prepare(model, ...) first."


@final
@dataclass(frozen=True, slots=True)
class BoostedModel:
    """A model, and the wrappers that the booster returned for it and its optimizer."""

    booster: Booster
    model: nn.Module
    engine: ModelWrapper
    optimizer: OptimizerWrapper | None


@final
class ColossalAIPlacement(Placement):
    """Move a model to this rank's device, and wrap it and its optimizer with a ColossalAI plugin.

    Args:
        plugin: the specification of a plugin, or a built plugin.
        world: the rank and the device of this process.

    Raises:
        PlacementError: if the plugin does not support this environment.
    """

    sharded = True
    trainable_is_fixed = True
    has_gradients = False
    params_are_master_weights = True
    params_accept_writes = True

    def __init__(self, plugin: PluginSpec | Plugin, world: World) -> None:
        # ColossalAI's logger is verbose and writes to the terminal directly.
        get_dist_logger().set_level("WARNING")
        # ColossalAI uses deprecated torch collectives and storages.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning, module=r"colossalai\.")
        if world.device.type == "cpu":
            train_on_cpu()
        self._plugin = plugin
        self._tp_size = plugin.tp_size if isinstance(plugin, PluginSpec) else plugin_traits(plugin).tp_size
        if world.size % self._tp_size:
            raise PlacementError(
                f"plugin: tp_size={self._tp_size} must divide the number of processes, but this run has {world.size}."
            )
        self._boosted_model: BoostedModel | None = None
        self._param_shards: dict[nn.Parameter, ParamShard] | None = None
        # The parameter names of the configured groups. The booster may remove frozen parameters from the groups.
        self.group_names: list[list[str]] = []
        self._dp_group: ProcessGroup | None = None
        self._no_sync: Callable[[], AbstractContextManager[object]] = nullcontext
        # Set if the plugin uses DistributedDataParallel.
        self._local_gradients: LocalGradients | None = None

    @property
    def uses_tensor_parallel(self) -> bool:
        """Whether layers are sharded across ranks (tensor parallelism)."""
        return self._tp_size > 1

    @property
    def has_master_weights(self) -> bool:
        """Whether the optimizer updates master weights whose dtype differs from the parameters' dtype."""
        return any(shard.master.dtype != shard.working.dtype for shard in self.param_shards.values())

    @property
    def param_shards(self) -> dict[nn.Parameter, ParamShard]:
        """This rank's shard of each parameter."""
        if self._param_shards is None:
            raise NotPreparedError(_NO_MODEL)
        return self._param_shards

    @property
    def boosted(self) -> BoostedModel:
        """The wrapped model with its booster and wrappers."""
        if self._boosted_model is None:
            raise NotPreparedError(_NO_MODEL)
        return self._boosted_model

    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        if is_model_wrapper(model):
            raise PlacementError(
                f"The model is already wrapped, in a {type(model).__name__}. Pass the model itself: the strategy wraps it."
            )
        model = steps.compile(steps.init_and_sync(model).to(world.device))
        if "train_step" in vars(model):
            raise PlacementError(
                "compile: target='train_step' cannot be used with ColossalAI, because it bypasses the booster's wrapper. Use "
                "target='forward'."
            )
        settings = None if steps.make_optim is None else require_plain_wrapper(steps.make_optim(model))
        plugin, traits = self._build(model, settings, world)
        _refuse_model(model, traits, world)
        if settings is not None:
            refuse_whole_parameters(
                settings.optimizer, zero=bool(traits.zero_stage), tensor_parallel=traits.tp_size > 1
            )
            self.group_names = parameter_names(settings.optimizer, model)
        booster = Booster(plugin=plugin)
        with warnings.catch_warnings():
            # ColossalAI uses deprecated torch options.
            warnings.simplefilter("ignore")
            layers = dict(model.named_modules())
            hooked, parameters = hooks_of_parameters(model), named_parameters(model)
            engine, optimizer, *_ = booster.boost(model, None if settings is None else settings.optimizer)
        _refuse_lost_hooks(layers, model)
        self._boosted_model = BoostedModel(booster, model, engine, optimizer)
        self._param_shards = param_shards(model, optimizer)
        _refuse_hooks_on_shards(hooked, parameters, self._param_shards)
        # Hooks may only read or write the model's weights if these are the complete master weights.
        self.params_are_master_weights = not self.has_master_weights and not self.uses_tensor_parallel
        self.params_accept_writes = all(shard.master is shard.working for shard in self._param_shards.values())
        if isinstance(plugin, HybridParallelPlugin) and traits.tp_size > 1:
            self._dp_group = plugin.dp_group
        if settings is None:
            return Placed(model=self._engine_module(engine, model))
        if traits.zero_stage < 2:
            # In stage 2, each rank keeps only its shard of the gradients, so they are reduced in each micro-batch.
            self._no_sync = partial(booster.no_sync, engine, optimizer)
            # Gradients cannot be saved in float16, because they are scaled, or with tensor parallelism, because they
            # are sharded.
            self.has_gradients = traits.precision != "fp16" and traits.tp_size == 1
        optim = BoosterOptimWrapper(
            optimizer,
            self._param_shards,
            settings,
            no_sync=self._no_sync,
            clipping=None if traits.clips else settings.clipping,
            norm_is_logged=traits.max_norm > 0,
            reduces_in_backward=traits.zero_stage > 0,
        )
        if isinstance(engine.module, DistributedDataParallel):
            self._local_gradients = LocalGradients.of(engine.module)
        return Placed(model=self._engine_module(engine, model), optim=optim)

    def _build(
        self, model: nn.Module, settings: AccumulatingOptimWrapper | None, world: World
    ) -> tuple[Plugin, PluginTraits]:
        """Return the plugin, configured with the optimizer wrapper's clipping, and its properties."""
        clipping = None if settings is None else settings.clipping
        if isinstance(self._plugin, PluginSpec):
            spec = self._plugin
            if spec.clips:
                spec = spec.with_options(max_norm=max_norm_of(clipping, spec.options.get("max_norm", 0.0)))
            plugin = build_plugin(spec, model, world.device)
            return plugin, plugin_traits(plugin)
        traits = plugin_traits(self._plugin)
        if traits.clips and max_norm_of(clipping, traits.max_norm) != traits.max_norm:
            raise PlacementError(
                "clip_grad of the optimizer wrapper has no effect on a plugin that is already built. Build the plugin with "
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
        if not isinstance(optim, BoosterOptimWrapper):
            raise PlacementError(
                "ColossalAI wraps a model together with its optimizer, but this model was prepared without one. Pass "
                "optim_wrapper to the first call of prepare()."
            )

    def gradient_policy(self, model: nn.Module, *, accumulates: bool) -> GradientPolicy:
        return GradientPolicy(
            sync_context=self._sync_context,
            always_set_grad_sync=accumulates,
            complete=None if self._local_gradients is None else self._local_gradients.complete,
        )

    def _sync_context(self, model: nn.Module, sync: bool) -> AbstractContextManager[object]:
        return NO_CONTEXT if sync else self._no_sync()

    def note_restored_gradients(self, model: nn.Module) -> None:
        if self._local_gradients is not None:
            self._local_gradients.missed = True

    def global_numel(self, parameter: nn.Parameter) -> int:
        return self.param_shards[parameter].shape.numel()

    def apply_trainable_change(self, model: nn.Module, change: TrainableChange) -> None:
        refuse_trainable_change("ColossalAI", change)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return cast("nn.Module", model.unwrapped) if isinstance(model, EngineModule) else model

    def _engine_module(self, engine: ModelWrapper, unwrapped: nn.Module) -> EngineModule:
        """Return a module that trains the model through ColossalAI but calls the model directly in evaluation.

        As a result, evaluation needs no communication between replicas, and ranks may have different numbers of batches.
        """
        # Casts floating-point inputs to the plugin's dtype.
        convert = getattr(engine, "convert_fn", None)

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            if convert is not None:
                args, kwargs = tree_map(convert, args), tree_map(convert, kwargs)
            return unwrapped(*args, **kwargs)

        def train(*args: Any, **kwargs: Any) -> Any:
            try:
                return engine(*args, **kwargs)
            except RuntimeError as error:
                if not isinstance(engine.module, DistributedDataParallel):
                    raise
                names = [name for name, value in unwrapped.named_parameters() if value.requires_grad]
                explained = unused_parameters_error(error, engine.module, names, _FIND_UNUSED)
                if explained is None:
                    raise
                raise explained from None

        return EngineModule(
            unwrapped,
            engine,
            engine="ColossalAI",
            training_forward=train,
            eval_forward=evaluate,
            before_train_step=self.check_trainable,
        )


def _refuse_model(model: nn.Module, traits: PluginTraits, world: World) -> None:
    if traits.zero_stage:
        refuse_empty_parameters("ColossalAI's ZeRO", model, "plugin='torch-ddp'")
    # Plugins that use DistributedDataParallel convert BatchNorm to SyncBatchNorm.
    replicates = not traits.clips or not traits.zero_stage
    if world.device.type == "cpu" and replicates and any(isinstance(each, _BatchNorm) for each in model.modules()):
        raise PlacementError(
            "This plugin converts BatchNorm to SyncBatchNorm, which requires an accelerator, and this run is on the CPU. Use "
            "plugin='lowlevel-zero', which keeps BatchNorm, or a normalization that does not depend on the batch."
        )


def _refuse_lost_hooks(layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    lost = lost_by_replacement(layers, dict(model.named_modules()))
    if lost:
        listed = ", ".join(f"{name!r} ({what})" for name, what in lost.items())
        raise PlacementError(
            f"ColossalAI replaced layers of {type(model).__name__}, and the new layers lack the hooks or the parametrization of "
            f"the original ones: {listed}. Exclude these layers from the tensor-parallel policy or plan, register the hooks on a "
            "module around them, or use FSDPStrategy(tp=...), which keeps hooks."
        )


def _refuse_hooks_on_shards(
    hooked: Mapping[str, Sequence[str]], before: Mapping[str, nn.Parameter], shards: Mapping[nn.Parameter, ParamShard]
) -> None:
    """Refuse hooks on the gradients of parameters that tensor parallelism sharded or replaced, also for later registrations."""
    now = {shard.name: parameter for parameter, shard in shards.items()}
    sharded = {shard.name: each for each, shard in shards.items() if shard.shape != shard.box.shape}
    for name, methods in hooked.items():
        if name in sharded or now.get(name) is not before[name]:
            raise PlacementError(f"{methods[0]} was called on {name}. {_NO_HOOKS}")
    refuse_gradient_hooks(sharded, GRADIENT_HOOKS, _NO_HOOKS)
