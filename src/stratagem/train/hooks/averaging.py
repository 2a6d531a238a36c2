"""Average the weights during training, and use the average for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any, Final, Literal, cast, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stratagem.checkpoint import AVERAGE_PART, weights_to_cpu, with_known_names
from stratagem.distributed import all_gather_object
from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError, StateError
from stratagem.model import AveragedModel
from stratagem.optim import OptimWrapperDict
from stratagem.parallel import AnyOptim
from stratagem.registry import MODELS
from stratagem.strategies.base import require_master_weights
from stratagem.tensors.dtensor import has_all_values, stack_over_ranks, to_local
from stratagem.train.evaluation.batch_norm import can_recompute_statistics, recompute_statistics
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.integers import require_integer
from stratagem.train.run.context import Run
from stratagem.train.run.device_batches import device_batches
from stratagem.utils import canonical_names

__all__ = ["EMAHook", "require_one_average"]

_MOST_NAMES: Final = 5


def require_one_average(hooks: Sequence[object]) -> None:
    """Require that at most one of the hooks averages the weights.

    Raises:
        ConfigValueError: if there are several.
    """
    if sum(isinstance(hook, EMAHook) for hook in hooks) > 1:
        raise ConfigValueError(
            "There are several EMAHooks, but an evaluation can only use one average. Keep one of them."
        )


@final
class EMAHook(Hook):
    """Average the weights over the optimizer steps, and use the average for validation and testing.

    The average is updated after each iteration in which the optimizer updated the weights, but not if the step was skipped
    or the accumulation window is incomplete. Checkpoints contain the trained weights in ``state_dict`` and the average in
    ``average``, with the same names. A resumed run continues the average. With ``load_from``, training starts a new average,
    and evaluation uses the average in the checkpoint, if there is one.

    Args:
        ema_type: ``"ExponentialMovingAverage"``, ``"MomentumAnnealingEMA"`` or ``"StochasticWeightAverage"``, or a
            mapping with the name as ``type`` and its arguments.
        momentum: the share of the current weights in the average; by default, the default of the class in ``ema_type``.
        gamma: an argument of ``MomentumAnnealingEMA``.
        interval: update the average every ``interval`` steps (or epochs).
        device: the device of the average; by default, the device of each weight.
        update_buffers: also average floating-point buffers.
        update_bn: recompute the running statistics of BatchNorm for the averaged weights with an epoch of the training data,
            as SWA requires: True at the end of training, ``"eval"`` also before each validation.
        update_bn_batches: the number of batches per rank for this; by default, the whole epoch.
        begin_iter: the first iteration, counted from 1, after which the average is updated.
        begin_epoch: the first epoch, counted from 1, in which the average is updated.
        by_epoch: update the average at the end of each epoch instead of after each step.
        strict_load: whether resuming from a checkpoint without an average, or with an average of another type, is an error;
            otherwise a new average is started.

    Raises:
        ConfigValueError: if both ``begin_iter`` and ``begin_epoch`` are given, or one of them is negative.
        PlacementError: at the start of the run, if the parameters of the model are not the master weights.
    """

    priority = Priority.NORMAL

    def __init__(
        self,
        ema_type: str | Mapping[str, Any] = "ExponentialMovingAverage",
        *,
        momentum: float | None = None,
        gamma: int | None = None,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
        update_bn: bool | Literal["eval"] = False,
        update_bn_batches: int | None = None,
        begin_iter: int = 0,
        begin_epoch: int = 0,
        by_epoch: bool = False,
        strict_load: bool = True,
    ) -> None:
        require_integer("EMAHook", "begin_iter", begin_iter, least=0)
        require_integer("EMAHook", "begin_epoch", begin_epoch, least=0)
        if begin_iter and begin_epoch:
            raise ConfigValueError(
                f"EMAHook: begin_iter={begin_iter} and begin_epoch={begin_epoch} are both set; set only one."
            )
        if update_bn not in (True, False, "eval"):
            raise ConfigValueError(f"EMAHook: update_bn must be True, False or 'eval', got {update_bn!r}.")
        if update_bn_batches is not None:
            require_integer("EMAHook", "update_bn_batches", update_bn_batches)
            if not update_bn:
                raise ConfigValueError(f"EMAHook: update_bn_batches={update_bn_batches} requires update_bn.")
        given = {"momentum": momentum, "gamma": gamma, "device": device}
        self._average_cfg: dict[str, Any] = {
            "interval": interval,
            "update_buffers": update_buffers,
            **{key: value for key, value in given.items() if value is not None},
            **({"type": ema_type} if isinstance(ema_type, str) else ema_type),
        }
        self._update_bn = update_bn
        self._update_bn_batches = update_bn_batches
        self._training = False
        self._begin_iter = begin_iter
        self._begin_epoch = begin_epoch
        self._by_epoch = by_epoch
        self._strict_load = strict_load
        self._model: nn.Module | None = None
        self._built: AveragedModel | None = None
        self._updates = 0
        self._saved: Mapping[str, Any] | None = None
        self._average_missing = False
        # Parts of the next checkpoint that were computed collectively.
        self._synced_buffers: dict[str, Tensor] = {}
        self._extra_parts: dict[str, Any] = {}

    def check_average(self) -> None:
        """Check the arguments of the average without the model of the run, if its class is a built-in one.

        Raises:
            ConfigError: (or a subclass) if an argument is invalid.
        """
        kind = self._average_cfg.get("type")
        target = MODELS.get(kind) if isinstance(kind, str) else kind
        if target is None or getattr(target, "__module__", None) == AveragedModel.__module__:
            self.build_average(nn.Module())

    def refuse_epochs(self) -> None:
        """Reject options that count epochs, for a run that counts iterations.

        Raises:
            ConfigValueError: if there is such an option.
        """
        if self._begin_epoch or self._by_epoch:
            what = "begin_epoch" if self._begin_epoch else "by_epoch"
            raise ConfigValueError(
                f"EMAHook: {what} counts epochs, but this run counts iterations. Use begin_iter and interval."
            )

    def get_triggered_stages(self) -> list[str]:
        events = ["after_load_checkpoint", "before_run", "before_train", "before_save_checkpoint"]
        if self._update_bn:
            events += ["before_val", "after_train"]
        by_iter, by_epoch = not self._by_epoch or self._update_bn, self._by_epoch or self._update_bn
        return [*events, *(["after_train_epoch"] if by_epoch else []), *(["after_train_iter"] if by_iter else [])]

    @property
    def average(self) -> AveragedModel:
        """The averaged model; available once the run has started.

        Raises:
            StateError: if the run has not started.
        """
        if self._built is None:
            raise StateError(
                "The averaged model is not available until the run starts: it is created after the model is placed."
            )
        return self._built

    def after_load_checkpoint(self, run: Run, checkpoint: dict[str, Any]) -> None:
        # Store the state, because the average may not exist yet.
        self._saved = checkpoint.get(AVERAGE_PART)
        self._average_missing = self._saved is None

    def before_run(self, run: Run) -> None:
        require_one_average(run.events.hooks)
        require_master_weights(type(run.strategy).__name__, available=run.strategy.params_are_master_weights)
        model = run.strategy.unwrap_model()
        if model is not self._model:
            self._model, self._built = model, self.build_average(model)
            run.evaluation_contexts.append(lambda: self._applied(run, synchronized=run.synchronizes_evaluation))
            run.before_saving.append(lambda: self._prepare_save(run))
            self._log_not_averaged(run)
        if self._saved is not None:
            self._load(run, self._saved)
            self._saved = None

    def before_train(self, run: Run) -> None:
        if run.max_epochs is None:
            self.refuse_epochs()
        if self._update_bn:
            self._check_update_bn(run)
        self._training = True
        if run.iter == 0:
            self.average.steps = self._updates = 0
            self.average.statistics = {}
        elif self._average_missing:
            self._start_without_saved(run)
        self._average_missing = False

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._by_epoch:
            return
        updates = _updates(run.optim_wrapper)
        if updates != self._updates:
            self._updates = updates
            if self._has_begun(run):
                self.average.update()
        if self._update_bn and run.iter + 1 == run.max_iters:
            self._update_statistics(run)

    def after_train_epoch(self, run: Run) -> None:
        updates = _updates(run.optim_wrapper)
        if self._by_epoch and updates != self._updates and self._has_begun(run):
            self._updates = updates
            self.average.update()
        if self._update_bn and run.max_epochs is not None and run.epoch + 1 == run.max_epochs:
            self._update_statistics(run)

    def before_val(self, run: Run) -> None:
        if self._update_bn == "eval" and self._training:
            self._update_statistics(run)

    def after_train(self, run: Run) -> None:
        self._training = False
        if self._update_bn and run.interrupt.received is None and self.average.steps and not self.average.statistics:
            self._update_statistics(run)
            if self.average.statistics:
                run.logger.warning(
                    "The run stopped early, so its checkpoints do not contain the BatchNorm statistics of the averaged weights "
                    "at the end. With EMAHook(update_bn='eval'), those saved after a validation do."
                )

    def before_save_checkpoint(self, run: Run, checkpoint: dict[str, Any]) -> None:
        average = self.average
        # An average without updates is empty.
        state = average.state_dict()
        averages = weights_to_cpu({**state["averages"], **self._synced_buffers}) if average.steps else {}
        statistics = {"statistics": weights_to_cpu(average.statistics)} if average.statistics else {}
        checkpoint[AVERAGE_PART] = {
            **state, "averages": averages, **statistics, "updates": self._updates, **self._extra_parts
        }  # fmt: skip
        if average.is_applied:
            checkpoint["state_dict"].update(weights_to_cpu(average.own_weights()))

    @contextmanager
    def _applied(self, run: Run, *, synchronized: bool) -> Iterator[None]:
        """Apply the average; entering the context is collective if its buffers are synchronized."""
        buffers = self._averaged_buffers()
        with self.average.applied(run.strategy.synchronized_copies(buffers) if synchronized else buffers):
            yield

    def _averaged_buffers(self) -> dict[str, Tensor]:
        average = self.average
        return {name: average.averages[name] for name in sorted(average.averaged_buffers)} if average.steps else {}

    def _prepare_save(self, run: Run) -> None:
        """Prepare the parts of the next checkpoint that require collectives. Collective."""
        own = self._averaged_buffers()
        self._synced_buffers = run.strategy.synchronized_copies(own)
        equal = all(torch.equal(to_local(self._synced_buffers[name]), to_local(each)) for name, each in own.items())
        self._extra_parts = {}
        aliases = _aliases(run.strategy.unwrap_model())
        if aliases:
            self._extra_parts["aliases"] = aliases
        if own and not all(all_gather_object(equal)):
            world = run.world
            whole = {name: to_local(each) for name, each in own.items() if has_all_values(each)}
            rows = {name: stack_over_ranks(each, world.size, world.device) for name, each in whole.items()}
            self._extra_parts["ranks"] = rows

    def _update_statistics(self, run: Run) -> None:
        """Recompute the BatchNorm statistics of the average, unless it has not changed since. Collective."""
        average, data = self.average, run.train_data
        if not average.steps or average.statistics or data is None:
            return
        with (
            closing(cast("Any", data.second_pass(run.epoch))) as epoch,
            self._applied(run, synchronized=True),
        ):
            count = min(data.length or 0, self._update_bn_batches or data.length or 0)
            statistics = recompute_statistics(run, device_batches(run, data, islice(epoch, count)))
        average.statistics = statistics

    def _check_update_bn(self, run: Run) -> None:
        model, data = run.strategy.unwrap_model(), run.train_data
        if not can_recompute_statistics(model):
            raise ConfigValueError(
                f"EMAHook: update_bn runs forward(mode='loss'), as the training step of a BaseModel does, but "
                f"{type(model).__name__} defines another train_step. Omit update_bn, or compute them after the training."
            )
        if data is None or not data.positioned or data.length is None:
            raise ConfigValueError(
                "EMAHook: update_bn reads the training data a second time, which requires a built-in sampler; this run has a "
                "custom loader, sampler or stream, whose state would change. Omit update_bn, or use a built-in sampler."
            )
        if not any(isinstance(module, _BatchNorm) for module in model.modules()):
            run.logger.warning("EMAHook: update_bn has no effect, because %s has no BatchNorm.", type(model).__name__)

    def build_average(self, model: nn.Module) -> AveragedModel:
        """Return a new average of a placed model, as this hook is configured.

        Raises:
            ConfigTypeError: if ``ema_type`` builds something other than an average.
        """
        built = MODELS.build(self._average_cfg, default_args={"model": model})
        if not isinstance(built, AveragedModel):
            raise ConfigTypeError(
                f"EMAHook: ema_type={self._average_cfg['type']!r} made a {type(built).__name__}, which is not an AveragedModel."
            )
        return built

    def _load(self, run: Run, saved: Mapping[str, Any]) -> None:
        average = self.average
        continues = run.train_data is not None and run.iter > 0
        if not continues:
            # An evaluation uses the saved average, regardless of its type.
            saved = {key: value for key, value in saved.items() if key != "settings"}
        elif (
            not self._strict_load and average.differences(saved) and saved["settings"]["type"] != type(average).__name__
        ):
            run.logger.warning(
                "The checkpoint contains a %s, and this run has a %s; starting a new average.",
                saved["settings"]["type"], type(average).__name__,
            )  # fmt: skip
            average.steps, self._updates = 0, int(saved["updates"])
            return
        if saved["steps"]:
            # In checkpoints of earlier versions, the names include wrappers inside the model.
            averages = with_known_names(saved["averages"], self.average.averages)
            if not self._strict_load:
                # Weights missing from the saved average are new to the model; their average starts at their current values.
                averages = {**average.averages, **averages}
            average.load_state_dict({**saved, "averages": averages})
            for name, rows in (saved.get("ranks") or {}).items():
                if name in average.averaged_buffers and len(rows) == run.world_size:
                    to_local(average.averages[name]).copy_(rows[run.rank])
            changed = average.differences(saved)
            if changed:
                run.logger.warning(
                    "The average was computed with other options and continues with those of this run: %s",
                    ", ".join(changed),
                )
        else:
            average.steps, average.statistics = 0, {}
        self._updates = int(saved["updates"])

    def _log_not_averaged(self, run: Run) -> None:
        names = self.average.not_averaged()
        if names:
            listed = ", ".join(names[:_MOST_NAMES]) + (", ..." if names[_MOST_NAMES:] else "")
            run.logger.info(
                "EMAHook uses the current values of %d parameters whose dtypes cannot be averaged: %s",
                len(names),
                listed,
            )

    def _start_without_saved(self, run: Run) -> None:
        if self._strict_load:
            raise CheckpointMismatchError(
                "The checkpoint contains no averaged weights, so the average cannot be resumed. Set "
                "EMAHook(strict_load=False) to start a new average."
            )
        run.logger.warning("No averaged weights in the checkpoint; starting a new average.")
        self.average.steps, self._updates = 0, _updates(run.optim_wrapper)

    def _has_begun(self, run: Run) -> bool:
        # The counters do not include the current iteration and epoch.
        return run.progress.iter + 1 >= self._begin_iter and run.progress.epoch + 1 >= self._begin_epoch


def _aliases(model: nn.Module) -> dict[str, str]:
    """Return a mapping from the additional names of tied parameters to the names under which they are averaged."""
    canonical = canonical_names(model)
    names = {id(each): canonical(name) for name, each in model.named_parameters()}
    everywhere = {canonical(name): id(each) for name, each in model.named_parameters(remove_duplicate=False)}
    return {name: names[each] for name, each in everywhere.items() if names[each] != name}


def _updates(optim: AnyOptim) -> int:
    """Return the total number of applied steps of all optimizers."""
    if isinstance(optim, OptimWrapperDict):
        return sum(wrapper.num_steps_applied for wrapper in optim.values())
    return optim.num_steps_applied
