"""Save checkpoints, and delete old ones."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.dist import is_main_process, master_only
from stratagem.compat.mmengine.fileio import FileClient, get_file_backend
from stratagem.compat.mmengine.hooks.hook import DATA_BATCH, Hook
from stratagem.compat.mmengine.hooks.metric_rules import GREATER_KEYS, LESS_KEYS, RULES, infer_rule
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.registry import HOOKS
from stratagem.compat.mmengine.utils import is_list_of, is_seq_of
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.storage import write_atomic
from stratagem.utils import did_you_mean, import_module

__all__ = ["CheckpointHook"]

_AUTO = "auto"
# The entry of the message hub with the checkpoints that a save made superfluous, in case the process is killed before it has
# deleted them.
_OUTDATED = "outdated_ckpt_ids"


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Save checkpoints periodically, at the end, and when a metric is better than ever.

    A checkpoint is deleted only after the one that replaces it is complete.

    Args:
        interval: the number of epochs or iterations between checkpoints; -1 for none.
        by_epoch: whether to count epochs; otherwise iterations.
        save_optimizer: whether checkpoints contain the state of the optimizer, which resuming needs.
        save_param_scheduler: whether they contain that of the schedulers.
        out_dir: the folder in which a folder with the name of the work directory receives the checkpoints; by default they are
            saved in the work directory.
        max_keep_ckpts: the number of periodic checkpoints to keep; -1 for all.
        save_last: whether to save at the end in any case.
        save_best: metrics whose best checkpoints are kept; ``"auto"`` for the first metric that a validation returns.
        rule: whether ``"greater"`` or ``"less"`` values are better, for all metrics or for each one; by default inferred from
            their names.
        greater_keys: names, or parts of names, of metrics for which greater values are better.
        less_keys: names, or parts of names, of metrics for which smaller values are better.
        file_client_args: arguments of a ``FileClient``; deprecated.
        filename_tmpl: the names of the files, with ``{}`` for the number of epochs or iterations.
        backend_args: arguments of the file backend.
        published_keys: the entries of the last and the best checkpoints to save once more, after the training, in files whose
            names contain a part of their checksum.
        save_begin: the number of epochs or iterations after which ``interval`` starts.
        **kwargs: further arguments of ``runner.save_checkpoint``.

    Raises:
        AssertionError: if ``save_best`` or ``rule`` is neither a string nor a list of strings, a metric is named twice, or the
            number of rules does not match.
        KeyError: if a rule is unknown.
        ValueError: if a rule cannot be inferred, ``save_begin`` is negative, or both ``file_client_args`` and ``backend_args``
            are given.
        TypeError: if ``published_keys`` has another type.
    """

    out_dir: Any
    priority = "VERY_LOW"
    rule_map = RULES
    init_value_map: ClassVar[dict[str, float]] = {"greater": -inf, "less": inf}
    _default_greater_keys: ClassVar[list[str]] = list(GREATER_KEYS)
    _default_less_keys: ClassVar[list[str]] = list(LESS_KEYS)

    def __init__(
        self,
        interval: int = -1,
        by_epoch: bool = True,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        out_dir: str | Path | None = None,
        max_keep_ckpts: int = -1,
        save_last: bool = True,
        save_best: str | list[str] | None = None,
        rule: str | list[str] | None = None,
        greater_keys: Sequence[str] | None = None,
        less_keys: Sequence[str] | None = None,
        file_client_args: dict[str, Any] | None = None,
        filename_tmpl: str | None = None,
        backend_args: dict[str, Any] | None = None,
        published_keys: str | list[str] | None = None,
        save_begin: int = 0,
        **kwargs: Any,
    ) -> None:
        if save_begin < 0:
            raise ConfigValueError(f"save_begin should not be less than 0, but got {save_begin}")
        self.interval = interval
        self.by_epoch = by_epoch
        self.save_optimizer = save_optimizer
        self.save_param_scheduler = save_param_scheduler
        self.out_dir = None if out_dir is None else os.fspath(out_dir)
        self.max_keep_ckpts = max_keep_ckpts
        self.save_last = save_last
        self.save_begin = save_begin
        self.args = kwargs
        _check_backend(file_client_args, backend_args)
        self.file_client_args = file_client_args
        self.backend_args = backend_args
        self.filename_tmpl = filename_tmpl or ("epoch_{}.pth" if by_epoch else "iter_{}.pth")
        self.save_best = _metrics(save_best)
        self.greater_keys: Any = _keys("greater_keys", greater_keys, self._default_greater_keys)
        self.less_keys: Any = _keys("less_keys", less_keys, self._default_less_keys)
        self.published_keys = _published(published_keys)
        self.last_ckpt: str | None = None
        # A validation without training, `runner.val()`, does not change the checkpoints of the run.
        self._is_training = False
        # The number of the periodic checkpoint that does not refer to the best ones of its validation.
        self._outdated_step: int | None = None
        self._init_best(rule)

    def _init_best(self, rule: str | list[str] | None) -> None:
        require(
            rule is None or isinstance(rule, str) or is_list_of(rule, str),
            f'"rule" should be a str or list of str or None, but got {rule!r} ({type(rule).__name__}).',
        )
        rules: list[Any] = list(rule) if isinstance(rule, list) else [rule]
        if self.save_best is None:
            return
        require(
            len(rules) in (1, len(self.save_best)),
            f'Number of "rule" must be 1 or the same as number of "save_best" ({len(self.save_best)}), but got {len(rules)}.',
        )
        self.is_better_than: dict[str, Any] = {}
        self._init_rule(rules, self.save_best)
        if len(self.key_indicators) == 1:
            self.best_ckpt_path: str | None = None
        else:
            self.best_ckpt_path_dict: dict[str, str | None] = {}

    def before_train(self, runner: Any) -> None:
        self._is_training = True
        if self.out_dir is None:
            self.out_dir = runner.work_dir
        self.file_client = FileClient.infer_client(self.file_client_args, self.out_dir)
        if self.file_client_args is None:
            self.file_backend: Any = get_file_backend(self.out_dir, backend_args=self.backend_args)
        else:
            self.file_backend = self.file_client
        if self.out_dir != runner.work_dir:
            self.out_dir = self.file_backend.join_path(self.out_dir, Path(runner.work_dir).name)
        runner.logger.info(f"Checkpoints will be saved to {self.out_dir}.")
        self._restore_best(runner.message_hub)
        if self.max_keep_ckpts > 0:
            self._restore_kept(runner.message_hub)

    def _restore_best(self, hub: Any) -> None:
        if self.save_best is None:
            return
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = hub.get_info("best_ckpt")
        else:
            self.best_ckpt_path_dict = {name: hub.get_info(f"best_ckpt_{name}") for name in self.key_indicators}

    def _restore_kept(self, hub: Any) -> None:
        """Delete the checkpoints that are too many, if ``max_keep_ckpts`` was reduced or a process was killed."""
        kept = list(hub.get_info("keep_ckpt_ids") or ())
        superfluous = max(0, len(kept) - self.max_keep_ckpts)
        self._remove_steps([*(hub.get_info(_OUTDATED) or ()), *kept[:superfluous]])
        self.keep_ckpt_ids: deque[int] = deque(kept[superfluous:], self.max_keep_ckpts)

    def after_train_epoch(self, runner: Any) -> None:
        if not self.by_epoch:
            return
        is_last = self.save_last and self.is_last_train_epoch(runner)
        if self.every_n_epochs(runner, self.interval, self.save_begin) or is_last:
            runner.logger.info(f"Saving checkpoint at {runner.epoch + 1} epochs")
            self._save_checkpoint(runner)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if self.by_epoch:
            return
        is_last = self.save_last and self.is_last_train_iter(runner)
        if self.every_n_train_iters(runner, self.interval, self.save_begin) or is_last:
            runner.logger.info(f"Saving checkpoint at {runner.iter + 1} iterations")
            self._save_checkpoint(runner)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if not metrics:
            runner.logger.warning("The validation returned no metrics, so the best checkpoint is not updated.")
            return
        if self._is_training:
            self._save_best_checkpoint(runner, metrics)

    def after_val(self, runner: Any) -> None:
        # After all hooks have seen the metrics, so that the run need not repeat the validation when it resumes.
        if self._is_training and self._outdated_step is not None:
            step, self._outdated_step = self._outdated_step, None
            self._save_checkpoint_with_step(runner, step, {"epoch": runner.epoch, "iter": runner.iter})

    def after_train(self, runner: Any) -> None:
        if self.published_keys is None:
            return
        if self.save_last and self.last_ckpt is not None:
            self._publish_model(runner, self.last_ckpt)
        best = [getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()]
        for path in best:
            if path is not None:
                self._publish_model(runner, path)

    def after_run(self, runner: Any) -> None:
        self._is_training = False

    @master_only
    def _publish_model(self, runner: Any, ckpt_path: str) -> None:
        """Save a part of a checkpoint once more, in a file whose name contains the beginning of its SHA-256 checksum."""
        # The runner imports the hooks.
        checkpoints = import_module("stratagem.compat.mmengine.runner.checkpoint")
        loaded = checkpoints._load_checkpoint(ckpt_path)
        published = {name: value for name, value in loaded.items() if name in (self.published_keys or ())}
        removed = [name for name in loaded if name not in published]
        if removed:
            print_log(
                f"{removed} will not be published. Add what you want to keep to published_keys.", logger="current"
            )
        checksum = hashlib.sha256(pickle.dumps(published)).hexdigest()
        path = f"{ckpt_path.removesuffix(Path(ckpt_path).suffix)}-{checksum[:8]}.pth"
        checkpoints.save_checkpoint(published, path)
        print_log(f"The checkpoint ({ckpt_path}) is published to {path}.", logger="current")

    def _save_checkpoint(self, runner: Any) -> None:
        epoch, iteration = runner.epoch, runner.iter
        step = (epoch if self.by_epoch else iteration) + 1
        meta = {"epoch": step, "iter": iteration} if self.by_epoch else {"epoch": epoch, "iter": step}
        self._save_checkpoint_with_step(runner, step, meta=meta)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, int]) -> None:
        """Save a periodic checkpoint, and then delete what is too many. Collective."""
        outdated = self._keep(step, runner.message_hub) if self.max_keep_ckpts > 0 else []
        name = self.filename_tmpl.format(step)
        path = str(self.file_backend.join_path(self.out_dir, name))
        self.last_ckpt = path
        runner.message_hub.update_info("last_ckpt", path)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            write_atomic(Path(runner.work_dir, "last_checkpoint"), path)
        if outdated:
            self._remove_steps(outdated)
            runner.message_hub.update_info(_OUTDATED, [])

    def _keep(self, step: int, hub: Any) -> list[int]:
        """Add a checkpoint to those that are kept; return which ones are too many then."""
        if self.keep_ckpt_ids and self.keep_ckpt_ids[-1] == step:
            return []
        outdated = [self.keep_ckpt_ids.popleft()] if len(self.keep_ckpt_ids) == self.max_keep_ckpts else []
        self.keep_ckpt_ids.append(step)
        hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        if outdated:
            hub.update_info(_OUTDATED, outdated)
        return outdated

    def _remove_steps(self, steps: Iterable[int]) -> None:
        for step in steps:
            self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step)))

    def _remove(self, path: str) -> bool:
        """Delete a checkpoint on rank 0; return whether there was one. Sharded checkpoints are folders."""
        if not is_main_process():
            return False
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)
        else:
            return False
        return True

    def _save_best_checkpoint(self, runner: Any, metrics: Mapping[str, Any]) -> None:
        """Save a checkpoint for each metric that is better than ever, and let the periodic one be saved again."""
        if not self.save_best:
            return
        step = runner.epoch if self.by_epoch else runner.iter
        meta = {"epoch": runner.epoch, "iter": runner.iter}
        if _AUTO in self.key_indicators:
            self._init_rule(self.rules, [next(iter(metrics))])
        updated = [
            self._update_best(runner, name, rule, _score(name, metrics), step, meta)
            for name, rule in zip(self.key_indicators, self.rules, strict=True)
        ]
        if any(updated) and self.last_ckpt is not None:
            self._outdated_step = step

    def _update_best(self, runner: Any, name: str, rule: str, score: Any, step: int, meta: dict[str, int]) -> bool:
        """Save the checkpoint of a metric if its value is better than ever; return whether it is."""
        hub, suffix = runner.message_hub, "" if len(self.key_indicators) == 1 else f"_{name}"
        best = hub.get_info(f"best_score{suffix}", self.init_value_map[rule])
        if score is None or not self.is_better_than[name](score, best):
            return False
        file = f"best_{name}_{self.filename_tmpl.format(step)}".replace("/", "_")
        path = self.file_backend.join_path(self.out_dir, file)
        previous = self.best_ckpt_path_dict.get(name) if suffix else self.best_ckpt_path
        if suffix:
            self.best_ckpt_path_dict[name] = path
        else:
            self.best_ckpt_path = path
        hub.update_info(f"best_score{suffix}", score)
        hub.update_info(f"best_ckpt{suffix}", path)
        runner.save_checkpoint(
            self.out_dir,
            filename=file,
            file_client_args=self.file_client_args,
            save_optimizer=False,
            save_param_scheduler=False,
            meta=meta,
            by_epoch=False,
            backend_args=self.backend_args,
        )
        unit = "epoch" if self.by_epoch else "iter"
        runner.logger.info(f"The best checkpoint with {score:0.4f} {name} at {step} {unit} is saved to {file}.")
        if previous and previous != path and self._remove(previous):
            runner.logger.info(f"The previous best checkpoint {previous} is removed")
        return True

    def _init_rule(self, rules: list[Any], key_indicators: list[str]) -> None:
        """Set the metrics and their rules."""
        self.rules: list[Any] = []
        for rule, name in zip(rules * len(key_indicators) if len(rules) == 1 else rules, key_indicators, strict=True):
            if rule is not None and rule not in RULES:
                raise ConfigKeyError(f"rule must be greater, less or None, but got {rule}.")
            # The metric of "auto" is not known before the first validation.
            known = rule if rule or name == _AUTO else infer_rule(name, self.greater_keys, self.less_keys)
            if known is not None:
                self.is_better_than[name] = RULES[known]
            self.rules.append(known)
        self.key_indicators = key_indicators


def _check_backend(file_client_args: Any, backend_args: Any) -> None:
    if file_client_args is None:
        return
    print_log(
        '"file_client_args" will be deprecated in future. Please use "backend_args" instead',
        logger="current",
        level=logging.WARNING,
    )
    if backend_args is not None:
        raise ConfigValueError(
            '"file_client_args" and "backend_args" cannot be set at the same time. Use "backend_args".'
        )


def _metrics(save_best: Any) -> list[str] | None:
    require(
        save_best is None or isinstance(save_best, str) or is_list_of(save_best, str),
        f'"save_best" should be a str or list of str or None, but got {save_best!r} ({type(save_best).__name__}).',
    )
    if not isinstance(save_best, list):
        return None if save_best is None else [save_best]
    require(
        _AUTO not in save_best or len(save_best) == 1,
        f'Only support one "auto" in "save_best" list, and nothing else, but got {save_best}.',
    )
    require(len(save_best) == len(set(save_best)), f'A metric occurs twice in "save_best": {save_best}.')
    return save_best


def _keys(name: str, given: Any, default: list[str]) -> Sequence[str]:
    keys: Sequence[str] = default if given is None else given if isinstance(given, list | tuple) else (given,)
    require(is_seq_of(keys, str), f'"{name}" should be a str or a sequence of str, but got {given!r}.')
    return keys


def _published(keys: Any) -> list[str] | None:
    if keys is not None and not isinstance(keys, str) and not is_seq_of(keys, str):
        raise ConfigTypeError(
            f'"published_keys" should be a str or a sequence of str or None, but got {keys!r} ({type(keys).__name__}).'
        )
    listed = None if keys is None else [keys] if isinstance(keys, str) else list(keys)
    require(listed is None or len(listed) == len(set(listed)), f'A key occurs twice in "published_keys": {keys}.')
    return listed


def _score(name: str, metrics: Mapping[str, Any]) -> Any:
    if name not in metrics:
        raise ConfigKeyError(
            f"CheckpointHook: save_best={name!r}, but the validation did not return this metric. "
            f"{did_you_mean(name, list(metrics))}"
        )
    return metrics[name]
