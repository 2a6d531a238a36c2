"""A model that DeepSpeed's engine trains: ZeRO's stages 0 to 3."""

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
from stratagem.engines.deepspeed.inputs import with_inputs_in
from stratagem.engines.deepspeed.master_weights import (
    MasterWeights,
    Stage0MasterWeights,
    Stage0Params,
    Stage3MasterWeights,
    Stage12MasterWeights,
)
from stratagem.engines.deepspeed.options import Options
from stratagem.engines.deepspeed.wrapper import DeepSpeedOptimWrapper, OriginalGroup, require_plain_wrapper
from stratagem.engines.engine_module import EngineModule
from stratagem.errors import ConfigValueError, PlacementError
from stratagem.model import is_model_wrapper
from stratagem.optim import OptimWrapper
from stratagem.optim.gradient_policy import NO_CONTEXT, GradientPolicy
from stratagem.parallel import AnyOptim, Placed, Placement, Steps

__all__ = ["DeepSpeedPlacement"]


@final
class DeepSpeedPlacement(Placement):
    """The model in DeepSpeed's engine, with its optimizer.

    Args:
        logger: says what was made.
        options: what was asked for.
        world: this process.
        micro_batch: returns the samples of a rank in an iteration, where they are known.

    Attributes:
        master_weights: where the engine keeps what it trains; None before it is made, and where nothing trains.
    """

    sharded = True
    # Until the window is complete they are in the engine.
    has_gradients = False

    def __init__(
        self, logger: logging.Logger, options: Options, world: World, micro_batch: Callable[[], int | None]
    ) -> None:
        self._logger = logger
        self._options = options
        self._micro_batch = micro_batch
        self.master_weights: MasterWeights | None = None
        self.params_are_master_weights = options.stage < 3 and options.dtype is None
        self.params_accept_writes = options.stage == 0 and options.dtype is None
        self._deepspeed = load_deepspeed(world)
        require_dtype(self._deepspeed, options.dtype)

    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        self._refuse(model)
        model = steps.compile(steps.init_and_sync(model).to(world.device))
        if "train_step" in vars(model):
            raise PlacementError(
                "compile: target='train_step' cannot be used under DeepSpeed, whose hooks around forward it would leave out. "
                "Compile target='forward'."
            )
        if steps.make_optim is None:
            return Placed(model=self._driven(self._in_type(model), model))
        settings = require_plain_wrapper(steps.make_optim(model))
        require_elementwise(
            settings.optimizer,
            stage=self._options.stage,
            allow_unknown=bool(self._options.config.get("zero_allow_untested_optimizer", False)),
        )
        originals = self._originals(settings.optimizer)
        groups = _remove_frozen(settings.optimizer)
        engine = make_engine(
            self._deepspeed,
            model,
            settings.optimizer,
            self._config(settings, world),
            cuts_parameters=self._options.stage == 3,
        )
        configure_checkpointing(self._deepspeed, self._options.config.get("activation_checkpointing"))
        self.master_weights = self._make_master_weights(engine, world)
        self._put_back(originals)
        optim = DeepSpeedOptimWrapper(engine, self.master_weights, settings, groups, dtype=self._options.dtype)
        self._logger.info(
            "DeepSpeed trains %s: ZeRO stage %d over %d ranks, %s.",
            type(model).__name__, self._options.stage, world.size, self._options.dtype or "in the parameters' own type",
        )  # fmt: skip
        return Placed(model=self._driven(model, engine.forward), optim=optim)

    def bind(self, optim: AnyOptim, model: nn.Module) -> None:
        if not isinstance(optim, DeepSpeedOptimWrapper):
            raise PlacementError(
                "DeepSpeed's engine is made with its optimizer, and this model was prepared without one. Give prepare() the "
                "optim_wrapper when it is called first."
            )

    def unwrap(self, model: nn.Module) -> nn.Module:
        return cast("nn.Module", model.bare) if isinstance(model, EngineModule) else model

    def global_numel(self, parameter: nn.Parameter) -> int:
        # Stage 3 leaves a parameter nothing between steps but what it notes of it.
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    def gradient_policy(self, model: nn.Module, *, accumulates: bool) -> GradientPolicy:
        # EngineOptim tells the engine in each backward pass whether it synchronizes.
        return GradientPolicy(sync_context=self._no_context)

    def _no_context(self, model: nn.Module, sync: bool) -> AbstractContextManager[object]:
        return NO_CONTEXT

    def _refuse(self, model: nn.Module) -> None:
        if is_model_wrapper(model):
            raise PlacementError(
                f"The model is wrapped already, in a {type(model).__name__}; give the strategy the bare model: the engine "
                "wraps it."
            )
        odd = {name: each.dtype for name, each in model.named_parameters() if each.dtype != torch.float32}
        if odd:
            name, dtype = next(iter(odd.items()))
            raise PlacementError(
                f"DeepSpeed keeps float32 masters, and {len(odd)} parameters are of another type: {name!r} is {dtype}. Give "
                "the model in float32, and choose what it computes in by bf16=dict(enabled=True) or fp16."
            )

    def _driven(self, model: nn.Module, forward: Callable[..., Any]) -> EngineModule:
        through = with_inputs_in(self._options.dtype, forward, self._options.half_inputs)
        return EngineModule(model, model, engine="DeepSpeed", training_forward=through, eval_forward=through)

    def _in_type(self, model: nn.Module) -> nn.Module:
        """Cast the parameters as the engine would."""
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
                f"{accumulation}. Give accumulative_counts alone."
            )
        limit = 0.0 if settings.clipping is None else settings.clipping.limit
        if options.clipping not in (None, limit):
            raise ConfigValueError(
                f"gradient_clipping={options.clipping}, but the optimizer wrapper has clip_grad=dict(max_norm={limit}). Give "
                "clip_grad alone."
            )
        micro_batch = self._micro_batch() or options.micro_batch or 1
        whole = options.stage == 0 and options.dtype is None
        return options.for_engine(
            micro_batch=micro_batch,
            accumulation=accumulation,
            clipping=limit if Stage0Params.clips or not whole else 0.0,
            world_size=world.size,
        )

    def _make_master_weights(self, engine: Any, world: World) -> MasterWeights:
        if self._options.stage == 3:
            return Stage3MasterWeights(engine.optimizer, world.rank)
        if self._options.stage:
            return Stage12MasterWeights(engine.optimizer, world.rank)
        if self._options.dtype is not None:
            # DeepSpeed has made a step without gradients, which counts and decays.
            engine.optimizer.state.clear()
            return Stage0MasterWeights(engine.optimizer)
        return Stage0Params([each for group in engine.optimizer.param_groups for each in group["params"]])

    def _originals(self, optimizer: Optimizer) -> dict[nn.Parameter, Tensor]:
        """Keep the weights as they are where the engine begins its masters with rounded ones."""
        if self._options.dtype is None:
            return {}
        trained = (each for group in optimizer.param_groups for each in group["params"] if each.requires_grad)
        return {each: each.detach().clone() for each in trained}

    @torch.no_grad()
    def _put_back(self, originals: dict[nn.Parameter, Tensor]) -> None:
        if not originals or self.master_weights is None:
            return
        for parameter, shard_range in self.master_weights.shard_ranges.items():
            values = originals[parameter].view(-1)[shard_range.start : shard_range.start + shard_range.count]
            shard_range.of(shard_range.flat).copy_(values)
        self.master_weights.update_model_params()


def _remove_frozen(optimizer: Optimizer) -> list[OriginalGroup]:
    """Take what does not learn out of the optimizer, which DeepSpeed cannot have there; return the groups as they were."""
    groups = [OriginalGroup(group, tuple(group["params"])) for group in optimizer.param_groups]
    for group in groups:
        group.options["params"] = [each for each in group.parameters if each.requires_grad]
    optimizer.param_groups[:] = [group.options for group in groups if group.options["params"]]
    if not optimizer.param_groups:
        raise PlacementError("No parameter of the model learns, so there is nothing for DeepSpeed to train.")
    return groups
