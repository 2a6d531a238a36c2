"""Folders that DeepSpeed's ``save_checkpoint`` wrote: read without DeepSpeed, and without executing anything from them.

A folder holds ``latest``, which names a sub-folder. In that, ``mp_rank_00_model_states.pt`` has the model and what the
program added, and from ZeRO's stage 1 on each rank's ``*zero_pp_rank_<r>_mp_rank_00_optim_states.pt`` has its parts of
the float32 masters and of the optimizer's state. Under stage 3 each rank has model states of its own as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, final

from torch import Tensor

from stratagem.checkpoint.foreign.normalize import LazyCheckpoint, under
from stratagem.checkpoint.foreign.torch_file import open_torch_file
from stratagem.checkpoint.foreign.zero_partitions import FlatPartition, PerParameterPartition, ZeroPartition
from stratagem.checkpoint.restricted_unpickler import PickledObject, mapping_items
from stratagem.checkpoint.tree.flatten import StateTree
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError

__all__ = ["DEEPSPEED_STATE", "deepspeed_meta", "is_deepspeed_folder", "read_deepspeed_folder"]

# Under which our own strategy adds what else a run keeps.
DEEPSPEED_STATE: Final = "stratagem"

_LATEST: Final = "latest"
_MODEL: Final = "mp_rank_00_model_states.pt"
_RANK_MODEL: Final = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_RANK_OPTIM: Final = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
# What optimizers keep for a tensor as a whole.
_OF_THE_WHOLE: Final = frozenset({"step", "mu", "eta", "mu_product"})


def is_deepspeed_folder(path: Path) -> bool:
    """Tell whether a path is a folder of DeepSpeed's, or the one in it that ``latest`` names."""
    if not path.is_dir():
        return False
    tag = path / _LATEST
    return any((folder / _MODEL).is_file() or _files(folder, _RANK_MODEL) for folder in _candidates(path, tag))


def deepspeed_meta(path: Path) -> Mapping[str, Any]:
    """Return the ``meta`` that our own strategy added to a folder; empty if another program saved it. No tensor is read.

    Raises:
        CheckpointError: (or a subclass) if it cannot be read.
    """
    folder = _folder_of(path)
    first = next(iter(_numbered(folder, _RANK_MODEL)), folder / _MODEL)
    with open_torch_file(first, "cpu") as contents:
        node = under(contents.root.get(DEEPSPEED_STATE), "meta")
        meta = None if node is None else contents.read(node, "meta")
    return meta if isinstance(meta, Mapping) else {}


def read_deepspeed_folder(path: Path, *, parts: Collection[str] | None = None) -> StateTree:
    """Return the state that a folder of DeepSpeed's holds, by name: float32 masters, moments, counts.

    Parameters are put together in memory, from the parts of all ranks.

    Raises:
        CheckpointNotFoundError: if it is none, or a rank's file is missing.
        CheckpointError: if it was saved by a kind of parallelism that is not read here.
        CheckpointDamagedError: if it cannot be read.
    """
    folder = _folder_of(path)
    optim_files = _numbered(folder, _RANK_OPTIM)
    model_files = _numbered(folder, _RANK_MODEL) or [folder / _MODEL]
    failure: CheckpointError | None = None
    tree: StateTree = {}
    with ExitStack() as opened:
        models = [opened.enter_context(open_torch_file(file, "cpu")) for file in model_files]
        optims = [opened.enter_context(open_torch_file(file, "cpu")) for file in optim_files]
        try:
            tree = _Saved(models, optims).tree(("state_dict", "optimizer") if parts is None else parts)
        except CheckpointError as error:
            # It is named here, and not by each file that is open.
            failure = type(error)(f"{folder}: {error}")
            failure.__cause__ = error
    if failure is not None:
        raise failure
    return tree if parts is None else {key: value for key, value in tree.items() if key in parts}


def _folder_of(path: Path) -> Path:
    """Return the folder that holds the files."""
    return next((each for each in _candidates(path, path / _LATEST) if each.is_dir()), path)


def _candidates(path: Path, tag: Path) -> list[Path]:
    if not tag.is_file():
        return [path]
    name = tag.read_text(encoding="utf-8", errors="replace").strip()
    # A name, and no way out of the folder.
    return [path / name] if name and Path(name).name == name else [path]


def _files(folder: Path, form: re.Pattern[str]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        match = form.fullmatch(file.name)
        if match:
            if int(match[2]):
                raise CheckpointError(
                    f"{folder} was saved with tensor parallel, whose parts are not put together here."
                )
            found[int(match[1])] = file
    return found


def _numbered(folder: Path, form: re.Pattern[str]) -> list[Path]:
    found = _files(folder, form)
    missing = sorted(set(range(len(found))) - set(found))
    if missing:
        raise CheckpointNotFoundError(f"{folder}: the file of rank {missing[0]} is missing beside {len(found)} others.")
    return [found[rank] for rank in range(len(found))]


# What says how a step is computed is chosen anew where the run goes on.
_NOT_OPTIONS: Final = frozenset({"params", "fused", "foreach"})


@final
class _Saved:
    """The files of one folder, opened.

    Args:
        models: the model states, of rank 0 first.
        optims: each rank's part of masters and moments; empty under stage 0.
    """

    def __init__(self, models: Sequence[LazyCheckpoint], optims: Sequence[LazyCheckpoint]) -> None:
        self._models = models
        self._optims = optims
        self._first = models[0]
        self._states = [self._state_of(each) for each in optims]
        count = self._value(self._first, "dp_world_size")
        if optims and isinstance(count, int) and count != len(optims):
            raise CheckpointNotFoundError(f"{count} ranks saved it, and the files of {len(optims)} are there.")

    def tree(self, wanted: Collection[str]) -> StateTree:
        """Return weights and the optimizer's state, where they are wanted, and what the program that saved added."""
        tree = self.rest()
        own = tree.pop("optimizer", None)
        if "state_dict" in wanted:
            tree["state_dict"] = self.weights()
        state = self.optimizer() if "optimizer" in wanted else None
        if state is not None:
            tree["optimizer"] = state if own is None else _told(own, state)
        return tree

    def weights(self) -> dict[str, Tensor]:
        """Return parameters and buffers by name, parameters in float32 where there are masters."""
        module = self._value(self._first, "module") or {}
        masters = self._masters()
        if not self._is_striped:
            # Tied parameters have one master, under the first of their names.
            places = {_place(module[name]): master for name, master in masters.items()}
            return {name: places.get(_place(value), value) for name, value in module.items()}
        # What stage 3 leaves in the modules are empty places, but for buffers.
        buffers = {name: module[name] for name in self._value(self._first, "buffer_names") or ()}
        values = {**self._frozen(), **masters, **buffers}
        for alias, name in dict(self._value(self._first, "shared_params") or {}).items():
            values.setdefault(alias, values[name])
        missing = [name for name in module if name not in values]
        if missing:
            raise CheckpointDamagedError(f"nothing holds the values of {missing[0]!r} and {len(missing) - 1} others.")
        return {name: values[name] for name in module}

    def optimizer(self) -> dict[str, Any] | None:
        """Return the optimizer's state by parameter name, or by index where no file tells names; None where there is none."""
        counts = self._counts()
        if not self._states:
            state = self._value(self._first, "optimizer")
            if not isinstance(state, Mapping):
                return None
            inner = state.get("optimizer_state_dict", state)
            return {**inner, "counts": counts, **_loss_scale(state)} if "param_groups" in inner else None
        base = self._base(0)
        if not isinstance(base, Mapping) or "param_groups" not in base:
            raise CheckpointError(
                "its optimizer state is of an old or elastic form, which is not read; its weights are."
            )
        slots: dict[str, dict[str, Any]] = {}
        cuts = self._cuts()
        for index, cut in enumerate(cuts):
            self._collect(index, cut, slots)
        groups = [self._group(number, group, cuts) for number, group in enumerate(base["param_groups"])]
        scaler = under(self._states[0], "loss_scaler")
        return {"state": slots, "param_groups": groups, "counts": counts, **_loss_scale(_attributes(scaler))}

    def rest(self) -> StateTree:
        """Return what the program that saved added, our own strategy's parts among it."""
        own = self._value(self._first, DEEPSPEED_STATE)
        return dict(own) if isinstance(own, Mapping) else {}

    def _state_of(self, contents: LazyCheckpoint) -> Mapping[Any, Any]:
        return mapping_items(contents.root.get("optimizer_state_dict")) or {}

    @staticmethod
    def _value(contents: LazyCheckpoint, key: str) -> Any:
        return contents.read(contents.root[key], key) if key in contents.root else None

    def _part(self, rank: int, key: str) -> Any:
        if key not in self._states[rank]:
            return None
        return self._optims[rank].read(self._states[rank][key], key)

    def _base(self, rank: int) -> Any:
        return self._part(rank, "optimizer_state_dict" if self._is_striped else "base_optimizer_state")

    @property
    def _is_striped(self) -> bool:
        return bool(self._states) and "fp32_flat_groups" in self._states[0]

    def _cuts(self) -> list[ZeroPartition]:
        shapes = self._value(self._first, "param_shapes")
        if not isinstance(shapes, list):
            raise CheckpointError("it does not tell the shapes of its parameters; it was saved by an old DeepSpeed.")
        if self._is_striped:
            return [PerParameterPartition(each) for each in shapes]
        gaps = self._part(0, "param_alignment_paddings") or [()] * len(shapes)
        return [FlatPartition(each, tuple(gap)) for each, gap in zip(shapes, gaps, strict=True)]

    def _masters(self) -> dict[str, Tensor]:
        if not self._states:
            return self._masters_by_place()
        key = "fp32_flat_groups" if self._is_striped else "single_partition_of_fp32_groups"
        flats = [self._part(rank, key) for rank in range(len(self._states))]
        found: dict[str, Tensor] = {}
        for index, cut in enumerate(self._cuts()):
            found.update(cut.whole([each[index].detach() for each in flats]))
        return found

    def _masters_by_place(self) -> dict[str, Tensor]:
        """Return the masters of stage 0 in 16 bits, which are numbered, where something tells their names."""
        state = self._value(self._first, "optimizer")
        groups = (state.get("fp32_groups") if isinstance(state, Mapping) else None) or []
        masters = [master.detach() for group in groups for master in group]
        names = self.rest().get("optimizer", {}).get("trained") or self._parameters_in_order()
        module = self._value(self._first, "module")
        alike = len(names) == len(masters) and all(
            module[name].shape == master.shape for name, master in zip(names, masters, strict=True)
        )
        return dict(zip(names, masters, strict=True)) if alike else {}

    def _parameters_in_order(self) -> list[str]:
        buffers = set(self._value(self._first, "buffer_names") or ())
        module = self._value(self._first, "module")
        first = {_place(value): name for name, value in reversed(module.items()) if name not in buffers}
        return [name for name, value in module.items() if first.get(_place(value)) == name]

    def _frozen(self) -> dict[str, Tensor]:
        shapes = self._value(self._first, "frozen_param_shapes") or {}
        fragments = [self._value(each, "frozen_param_fragments") or {} for each in self._models]
        found: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            found.update(PerParameterPartition({name: shape}).whole([each[name] for each in fragments]))
        return found

    def _collect(self, index: int, cut: ZeroPartition, slots: dict[str, dict[str, Any]]) -> None:
        """Add the moments of one flat tensor to those of the parameters that lie in it."""
        states = [self._base(rank)["state"].get(index, {}) for rank in range(len(self._states))]
        for key, first in states[0].items():
            elementwise = isinstance(first, Tensor) and first.ndim == 1 and key not in _OF_THE_WHOLE
            if elementwise:
                for name, whole in cut.whole([each[key] for each in states]):
                    slots.setdefault(name, {})[key] = whole
            else:
                for name in cut.shapes:
                    slots.setdefault(name, {})[key] = first

    def _group(self, number: int, group: Mapping[str, Any], cuts: Sequence[ZeroPartition]) -> dict[str, Any]:
        """Return a group's options, with names in the place of its flat tensors."""
        names = [name for index in group["params"] for name in cuts[index].shapes]
        frozen = self._value(self._first, "frozen_param_shapes") or {}
        if len(self._base(0)["param_groups"]) == 1:
            # Others keep what does not learn in its group.
            names += [name for name in frozen if name not in names]
        return {**{key: value for key, value in group.items() if key not in _NOT_OPTIONS}, "params": names}

    def _counts(self) -> dict[str, int]:
        steps, skipped = (self._value(self._first, key) or 0 for key in ("global_steps", "skipped_steps"))
        config = self._value(self._first, "ds_config")
        accumulated = config.get("gradient_accumulation_steps", 1) if isinstance(config, Mapping) else 1
        accumulated = accumulated if isinstance(accumulated, int) else 1
        return {"inner_count": steps * accumulated, "attempts": steps, "updates": steps - skipped, "pending": 0}


def _place(value: Any) -> Any:
    """Return where a tensor lies: that of tied parameters is the same."""
    return (value.data_ptr(), value.shape) if isinstance(value, Tensor) and value.numel() else id(value)


def _told(own: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state by the names that our own strategy added, with its counts."""
    names = own["trained"]
    slots = {names[key] if isinstance(key, int) else key: value for key, value in state["state"].items()}
    return {**{key: value for key, value in own.items() if key != "trained"}, "state": slots}


def _attributes(node: Any) -> Mapping[Any, Any]:
    """Return what an object would have had as attributes; it is not made."""
    return (mapping_items(node.state) or {}) if isinstance(node, PickledObject) else {}


def _loss_scale(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the loss scale in the form of torch's ``GradScaler``; empty where it does not move."""
    scale, window = state.get("cur_scale"), state.get("scale_window")
    done, last = state.get("cur_iter"), state.get("last_overflow_iter")
    if not all(isinstance(each, int | float) for each in (scale, window, done, last)):
        return {}
    scaler: dict[str, Any] = {
        "scale": float(scale),  # type: ignore[arg-type]  # checked above
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": window,
        "_growth_tracker": done - last - 1,  # type: ignore[operator]  # checked above
    }
    hysteresis = state.get("cur_hysteresis")
    return {"loss_scaler": scaler | ({"hysteresis": hysteresis} if isinstance(hysteresis, int) else {})}
