"""Wrap a model in DeepSpeed's engine, with ZeRO stages 0 to 3."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stratagem.distributed import World
from stratagem.engines.deepspeed.bootstrap import (
    configure_checkpointing,
    load_deepspeed,
    make_engine,
    require_dtype,
)
from stratagem.engines.deepspeed.elementwise_check import require_elementwise
from stratagem.engines.deepspeed.inputs import cast_inputs
from stratagem.engines.deepspeed.master_weights import (
    MasterWeights,
    Stage0MasterWeights,
    Stage0Params,
    Stage3MasterWeights,
    Stage12MasterWeights,
)
from stratagem.engines.deepspeed.options import Options
from stratagem.engines.deepspeed.unused_parameters import UnusedParameters
from stratagem.engines.deepspeed.wrapper import DeepSpeedEngineOptimWrapper, OriginalGroup, require_plain_wrapper
from stratagem.engines.engine_module import EngineModule, refuse_empty_parameters, refuse_trainable_change
from stratagem.errors import ConfigValueError, PlacementError
from stratagem.model import is_model_wrapper
from stratagem.optim import OptimWrapper
from stratagem.optim.gradient_policy import NO_CONTEXT, GradientPolicy
from stratagem.parallel import AnyOptim, Placed, Placement, Steps
from stratagem.parallel.trainable import TrainableChange

__all__ = ["DeepSpeedPlacement"]


@final
class DeepSpeedPlacement(Placement):
    """Wrap a model and its optimizer in DeepSpeed's engine.

    Args:
        logger: the logger for the ZeRO stage and the dtype.
        options: DeepSpeed's options.
        world: the rank and the device of this process.
        micro_batch: a function that returns the number of samples that a rank processes in an iteration, or None if it
            is unknown.

    Attributes:
        master_weights: the master weights in the engine; None before the engine is created, and without an optimizer.
    """

    sharded = True
    trainable_is_fixed = True
    # The engine stores gradients until the accumulation window is complete.
    has_gradients = False

    def __init__(
        self, logger: logging.Logger, options: Options, world: World, micro_batch: Callable[[], int | None]
    ) -> None:
        self._logger = logger
        self._options = options
        self._micro_batch = micro_batch
        self.master_weights: MasterWeights | None = None
        self.params_are_master_weights = options.params_are_master_weights
        self.params_accept_writes = options.stage == 0 and options.dtype is None
        self._deepspeed = load_deepspeed(world)
        require_dtype(self._deepspeed, options.dtype)

    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        self._refuse(model)
        model = steps.compile(steps.init_and_sync(model).to(world.device))
        if "train_step" in vars(model):
            raise PlacementError(
                "compile: target='train_step' cannot be used under DeepSpeed, because it bypasses DeepSpeed's forward "
                "hooks. Use target='forward'."
            )
        if steps.make_optim is None:
            return Placed(model=self._engine_module(self._cast_parameters(model), model))
        settings = require_plain_wrapper(steps.make_optim(model))
        require_elementwise(
            settings.optimizer,
            stage=self._options.stage,
            allow_unknown=self._options.allows_unknown_optimizers,
        )
        originals = self._originals(settings.optimizer)
        groups = _remove_frozen(settings.optimizer)
        trained = {each for group in settings.optimizer.param_groups for each in group["params"]}
        unused = UnusedParameters({each: name for name, each in model.named_parameters() if each in trained})
        engine = make_engine(
            self._deepspeed,
            model,
            settings.optimizer,
            self._config(settings, world),
            shards_parameters=self._options.stage == 3,
        )
        configure_checkpointing(self._deepspeed, self._options.config.get("activation_checkpointing"))
        self.master_weights = self._make_master_weights(engine, world)
        self._restore_originals(originals)
        optim = DeepSpeedEngineOptimWrapper(
            engine, self.master_weights, settings, groups, unused, dtype=self._options.dtype
        )
        self._logger.info(
            "Training %s with DeepSpeed: ZeRO stage %d, %d ranks, %s.",
            type(model).__name__, self._options.stage, world.size, self._options.dtype or "in the dtype of the parameters",
        )  # fmt: skip
        return Placed(model=self._engine_module(model, engine.forward), optim=optim)

    def bind(self, optim: AnyOptim, model: nn.Module) -> None:
        if not isinstance(optim, DeepSpeedEngineOptimWrapper):
            raise PlacementError(
                "DeepSpeed's engine is created together with its optimizer, but this model was prepared without one. Pass "
                "optim_wrapper to the first call of prepare()."
            )

    def unwrap(self, model: nn.Module) -> nn.Module:
        return cast("nn.Module", model.unwrapped) if isinstance(model, EngineModule) else model

    def apply_trainable_change(self, model: nn.Module, change: TrainableChange) -> None:
        refuse_trainable_change("DeepSpeed", change)

    def global_numel(self, parameter: nn.Parameter) -> int:
        # Between stage-3 steps, a parameter is empty and stores its size in an attribute.
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    def gradient_policy(self, model: nn.Module, *, accumulates: bool) -> GradientPolicy:
        # DeepSpeedEngineOptimWrapper sets in each backward pass whether the engine reduces gradients.
        return GradientPolicy(sync_context=self._no_context)

    def _no_context(self, model: nn.Module, sync: bool) -> AbstractContextManager[object]:
        return NO_CONTEXT

    def _refuse(self, model: nn.Module) -> None:
        if is_model_wrapper(model):
            raise PlacementError(
                f"The model is already wrapped, in a {type(model).__name__}. Pass the model itself: the engine wraps it."
            )
        if self._options.stage == 3:
            refuse_empty_parameters("ZeRO stage 3", model, "stage 2")
        others = {name: each.dtype for name, each in model.named_parameters() if each.dtype != torch.float32}
        if others:
            name, dtype = next(iter(others.items()))
            raise PlacementError(
                f"DeepSpeed keeps float32 master weights, but {len(others)} parameters have a different dtype: {name!r} is "
                f"{dtype}. Build the model in float32, and select the dtype of the computation with bf16=dict(enabled=True) or "
                "fp16=dict(enabled=True)."
            )

    def _engine_module(self, model: nn.Module, forward: Callable[..., Any]) -> EngineModule:
        forward_with_cast = cast_inputs(self._options.dtype, forward, self._options.half_inputs)
        return EngineModule(
            model,
            model,
            engine="DeepSpeed",
            training_forward=forward_with_cast,
            eval_forward=forward_with_cast,
            before_train_step=self.check_trainable,
        )

    def _cast_parameters(self, model: nn.Module) -> nn.Module:
        """Cast the parameters as the engine does."""
        if self._options.dtype is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(self._options.dtype)
        return model

    def _config(self, settings: OptimWrapper, world: World) -> dict[str, Any]:
        options = self._options
        accumulation = settings.accumulative_counts
        if options.accumulation not in (None, accumulation):
            raise ConfigValueError(
                f"gradient_accumulation_steps={options.accumulation}, but the optimizer wrapper's accumulative_counts is "
                f"{accumulation}. Specify only accumulative_counts."
            )
        limit = 0.0 if settings.clipping is None else settings.clipping.limit
        if options.clipping not in (None, limit):
            raise ConfigValueError(
                f"gradient_clipping={options.clipping}, but the optimizer wrapper has clip_grad=dict(max_norm={limit}). Specify "
                "only clip_grad."
            )
        micro_batch = self._micro_batch() or options.micro_batch or 1
        updates_params = options.stage == 0 and options.dtype is None
        return options.for_engine(
            micro_batch=micro_batch,
            accumulation=accumulation,
            clipping=limit if Stage0Params.clips or not updates_params else 0.0,
            world_size=world.size,
        )

    def _make_master_weights(self, engine: Any, world: World) -> MasterWeights:
        if self._options.stage == 3:
            return Stage3MasterWeights(engine.optimizer, world.rank)
        if self._options.stage:
            return Stage12MasterWeights(engine.optimizer, world.rank)
        if self._options.dtype is not None:
            # On creation, DeepSpeed performs a step without gradients. Remove the state that this step created.
            engine.optimizer.state.clear()
            return Stage0MasterWeights(engine.optimizer)
        return Stage0Params([each for group in engine.optimizer.param_groups for each in group["params"]])

    def _originals(self, optimizer: Optimizer) -> dict[nn.Parameter, Tensor]:
        """Return copies of the float32 weights if the engine would initialize its master weights from rounded ones."""
        if self._options.dtype is None:
            return {}
        trained = (each for group in optimizer.param_groups for each in group["params"] if each.requires_grad)
        return {each: each.detach().clone() for each in trained}

    @torch.no_grad()
    def _restore_originals(self, originals: dict[nn.Parameter, Tensor]) -> None:
        if not originals or self.master_weights is None:
            return
        for parameter, shard_range in self.master_weights.shard_ranges.items():
            values = originals[parameter].view(-1)[shard_range.start : shard_range.start + shard_range.count]
            shard_range.of(shard_range.flat).copy_(values)
        self.master_weights.update_model_params()


def _remove_frozen(optimizer: Optimizer) -> list[OriginalGroup]:
    """Remove frozen parameters from the optimizer, since DeepSpeed does not support them. Return the original groups."""
    groups = [OriginalGroup(group, tuple(group["params"])) for group in optimizer.param_groups]
    for group in groups:
        group.options["params"] = [each for each in group.parameters if each.requires_grad]
    optimizer.param_groups[:] = [group.options for group in groups if group.options["params"]]
    if not optimizer.param_groups:
        raise PlacementError(
            "The model has no trainable parameters, which DeepSpeed requires. Check requires_grad of the parameters "
            "and paramwise_cfg."
        )
    return groups
