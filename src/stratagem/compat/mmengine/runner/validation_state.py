"""The state of a run around a validation: stopping in the middle, and not repeating one that is complete."""

from __future__ import annotations

import logging
import pickle
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, final

from torch.utils.data import IterableDataset

from stratagem.checkpoint import CheckpointLoader, save_checkpoint
from stratagem.compat.mmengine.logging import HistoryBuffer
from stratagem.compat.mmengine.runner.loops import ValLoop
from stratagem.compat.mmengine.runner.state_values import history_arguments, plain_history, scheduler_states
from stratagem.data.rank_share import length_of
from stratagem.distributed import RankGroup, all_gather_object
from stratagem.errors import CheckpointError
from stratagem.utils import generator_state, restore_generator_state

__all__ = ["ValidationState"]

_FILE: Final = "validation.pth"
_BUILT_IN: Final = "stratagem."


@final
class ValidationState:
    """Stops a validation in the middle, and records the changes of a complete one.

    A checkpoint is saved after an epoch, before its validation. When the validation is complete, its changes are written
    to a small file in the log directory, so that a run that resumes from the checkpoint need not repeat it. If other parts of
    the checkpoint may have changed, such as a schedule that depends on a metric, there is no such file, and the resumed run
    repeats the validation.

    Args:
        runner: the runner.

    Attributes:
        token: identifies the last checkpoint from which a run can resume; part of the checkpoint.
    """

    def __init__(self, runner: Any) -> None:
        self.token: str | None = None
        self._runner = runner
        self._saved_at = -1
        self._lengths: Mapping[str, int] = {}
        self._schedules = b""
        self._can_stop = False
        self._generators: Mapping[str, Any] = {}

    # ---- stopping in the middle -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Record the random states before a validation, and whether a signal can stop it. Collective."""
        loop = self._runner.val_loop
        loader = getattr(loop, "dataloader", None)
        length = None if isinstance(getattr(loader, "dataset", None), IterableDataset) else length_of(loader)
        is_plain = getattr(type(loop), "run", None) is ValLoop.run
        lengths = set(all_gather_object(length if is_plain else None))
        # The ranks stop after the same number of batches, so all must have the same number. Hooks of users may have replaced the
        # weights, as EMAHook does, until the end of the validation.
        are_equal = self._runner.world_size == 1 or (len(lengths) == 1 and None not in lengths)
        self._can_stop = are_equal and not self._has_hook_of_user("before_val", "before_val_epoch")
        self._generators = generator_state()

    def can_stop(self, request: Callable[[], bool]) -> bool:
        """Return whether the ranks stop after this batch; if so, restore the random states, since the validation is repeated.

        Args:
            request: returns whether the ranks stop here.
        """
        if not (self._can_stop and request()):
            return False
        restore_generator_state(self._generators)
        return True

    # ---- a complete validation ------------------------------------------------------------------------------------

    def expect_checkpoint(self, iteration: int, *, validated: int) -> None:
        """Record the state of which a checkpoint with a new token is about to be saved.

        Args:
            iteration: the iteration of the checkpoint.
            validated: the iteration of the last complete validation.
        """
        runner = self._runner
        self.token = uuid.uuid4().hex
        # A checkpoint that is saved after the validation of its iteration contains what that has changed.
        self._saved_at = -1 if validated == iteration else iteration
        self._lengths = {name: _count(each) for name, each in runner.message_hub.log_scalars.items()}
        self._schedules = pickle.dumps(scheduler_states(runner.param_schedulers))

    def write(self) -> None:
        """Write what the validation has changed since the checkpoint of the same iteration was saved. Collective."""
        runner = self._runner
        if self._saved_at != runner.iter or self._must_repeat():
            return
        hub = runner.message_hub.state_dict()
        changed = {
            name: plain_history(each)
            for name, each in hub["log_scalars"].items()
            if self._lengths.get(name) != _count(each) or _count(each) == each.max_length
        }
        state = {
            "token": self.token,
            "iter": runner.iter,
            "log_scalars": changed,
            "runtime_info": hub["runtime_info"],
            "resumed_keys": {name: kept for name, kept in hub["resumed_keys"].items() if _is_part(name, changed, hub)},
            "generators": {str(rank): each for rank, each in enumerate(all_gather_object(generator_state()))},
        }
        if runner.rank == 0:
            try:
                save_checkpoint(state, Path(runner.log_dir) / _FILE)
            except (CheckpointError, OSError) as error:
                runner.logger.info(f"A run that resumes from the last checkpoint repeats this validation: {error}")

    def _must_repeat(self) -> bool:
        """Return whether the validation may have changed a part of the checkpoint that the file does not contain."""
        runner = self._runner
        if getattr(runner.train_loop, "stop_training", False) or self._schedules != pickle.dumps(
            scheduler_states(runner.param_schedulers)
        ):
            return True
        # Hooks of users may have added entries to the checkpoint.
        return self._has_hook_of_user("before_save_checkpoint")

    def _has_hook_of_user(self, *stages: str) -> bool:
        """Return whether a hook that is not part of this package acts at one of the stages."""
        own = [hook for hook in self._runner.hooks if not type(hook).__module__.startswith(_BUILT_IN)]
        return any(not set(stages).isdisjoint(hook.get_triggered_stages()) for hook in own)

    def restore(self, token: Any, iteration: int) -> bool:
        """Restore what the validation after a checkpoint has changed, if it was complete; return whether it was. Collective.

        Args:
            token: the token of the checkpoint.
            iteration: the number of iterations in the checkpoint.
        """
        runner = self._runner
        folder = Path(runner.work_dir)
        state = RankGroup.of().run_on_rank0(lambda: _find(folder, token, runner.logger)) if token else None
        if state is None or state["iter"] != iteration:
            return False
        histories = {name: HistoryBuffer(**history_arguments(each)) for name, each in state["log_scalars"].items()}
        parts = {name: state[name] for name in ("runtime_info", "resumed_keys")}
        runner.message_hub.load_state_dict({"log_scalars": histories, **parts})
        own = state["generators"].get(str(runner.rank))
        if own is not None:
            restore_generator_state(own)
        return True


def _find(folder: Path, token: str, logger: logging.Logger) -> Mapping[str, Any] | None:
    """Return the file of the validation that followed a checkpoint; None if there is none."""
    for path in sorted(folder.glob(f"*/{_FILE}"), reverse=True):
        try:
            state = CheckpointLoader.load_checkpoint(path, "cpu")
        except (CheckpointError, OSError) as error:
            logger.warning(f"{path} cannot be read, so a validation may be repeated: {error}")
            continue
        if state.get("token") == token:
            return state
    return None


def _is_part(name: str, scalars: Mapping[str, Any], hub: Mapping[str, Any]) -> bool:
    return name in scalars or name in hub["runtime_info"]


def _count(history: HistoryBuffer) -> int:
    return len(history.data[0])
