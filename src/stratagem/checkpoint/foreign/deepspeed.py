"""Read folders written by DeepSpeed's ``save_checkpoint``, without DeepSpeed and without executing code from them.

A folder contains the file ``latest``, which names a subfolder. There, ``mp_rank_00_model_states.pt`` holds the model and
the client state. From ZeRO stage 1 on, each rank's ``*zero_pp_rank_<r>_mp_rank_00_optim_states.pt`` holds its partition
of the float32 master weights and the optimizer state. In stage 3, each rank also has its own model states.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, final

from torch import Tensor

from stratagem.checkpoint.foreign.normalize import LazyCheckpoint, get_nested
from stratagem.checkpoint.foreign.torch_file import open_torch_file
from stratagem.checkpoint.foreign.zero_partitions import FlatPartition, PerParameterPartition, ZeroPartition
from stratagem.checkpoint.restricted_unpickler import PickledObject, mapping_items
from stratagem.checkpoint.tree.flatten import StateTree
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError

__all__ = ["DEEPSPEED_STATE", "deepspeed_meta", "is_deepspeed_folder", "read_deepspeed_folder"]

# The key of the client state in which DeepSpeedStrategy stores the other parts.
DEEPSPEED_STATE: Final = "stratagem"

_LATEST: Final = "latest"
_MODEL: Final = "mp_rank_00_model_states.pt"
_RANK_MODEL: Final = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_RANK_OPTIM: Final = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
# Optimizer state that is not elementwise.
_PER_TENSOR_STATE: Final = frozenset({"step", "mu", "eta", "mu_product"})


def is_deepspeed_folder(path: Path) -> bool:
    """Return whether ``path`` is a folder written by DeepSpeed, or the subfolder that its file ``latest`` names."""
    if not path.is_dir():
        return False
    tag = path / _LATEST
    return any((folder / _MODEL).is_file() or _files(folder, _RANK_MODEL) for folder in _candidates(path, tag))


def deepspeed_meta(path: Path) -> Mapping[str, Any]:
    """Return the ``meta`` that DeepSpeedStrategy added; empty if another program saved the folder. Reads no tensors.

    Raises:
        CheckpointError: (or a subclass) if the folder cannot be read.
    """
    folder = _folder_of(path)
    first = next(iter(_rank_files(folder, _RANK_MODEL)), folder / _MODEL)
    with open_torch_file(first, "cpu") as checkpoint:
        node = get_nested(checkpoint.entries.get(DEEPSPEED_STATE), "meta")
        meta = None if node is None else checkpoint.read(node, "meta")
    return meta if isinstance(meta, Mapping) else {}


def read_deepspeed_folder(path: Path, *, parts: Collection[str] | None = None) -> StateTree:
    """Return the state of a DeepSpeed folder, keyed by name: float32 master weights, optimizer state, counters.

    Parameters are gathered in memory from the partitions of all ranks.

    Raises:
        CheckpointNotFoundError: if it is not a DeepSpeed folder, or the file of a rank is missing.
        CheckpointError: if it was saved with an unsupported kind of parallelism.
        CheckpointDamagedError: if it cannot be read.
    """
    folder = _folder_of(path)
    optim_files = _rank_files(folder, _RANK_OPTIM)
    model_files = _rank_files(folder, _RANK_MODEL) or [folder / _MODEL]
    failure: CheckpointError | None = None
    tree: StateTree = {}
    with ExitStack() as opened:
        models = [opened.enter_context(open_torch_file(file, "cpu")) for file in model_files]
        optims = [opened.enter_context(open_torch_file(file, "cpu")) for file in optim_files]
        try:
            tree = _DeepSpeedFiles(models, optims).tree(("state_dict", "optimizer") if parts is None else parts)
        except CheckpointError as error:
            # Raise the error, with the folder's name, outside these contexts, because each of them would also add a
            # file name.
            failure = type(error)(f"{folder}: {error}")
            failure.__cause__ = error
    if failure is not None:
        raise failure
    return tree if parts is None else {key: value for key, value in tree.items() if key in parts}


def _folder_of(path: Path) -> Path:
    """Return the folder that contains the checkpoint files: ``path``, or the subfolder that its file ``latest`` names."""
    return next((each for each in _candidates(path, path / _LATEST) if each.is_dir()), path)


def _candidates(path: Path, tag: Path) -> list[Path]:
    if not tag.is_file():
        return [path]
    name = tag.read_text(encoding="utf-8", errors="replace").strip()
    # Accept only a plain name, which cannot refer to a path outside the folder.
    return [path / name] if name and Path(name).name == name else [path]


def _files(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        match = pattern.fullmatch(file.name)
        if match:
            if int(match[2]):
                raise CheckpointError(f"{folder} was saved with tensor parallelism, which cannot be converted.")
            found[int(match[1])] = file
    return found


def _rank_files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    found = _files(folder, pattern)
    missing = sorted(set(range(len(found))) - set(found))
    if missing:
        raise CheckpointNotFoundError(
            f"{folder}: the file of rank {missing[0]} is missing, but the files of {len(found)} other ranks exist."
        )
    return [found[rank] for rank in range(len(found))]


# Options that are not restored: a resumed run chooses the optimizer's implementation (fused or foreach) itself.
_EXCLUDED_OPTIONS: Final = frozenset({"params", "fused", "foreach"})


@final
class _DeepSpeedFiles:
    """The opened files of one folder.

    Args:
        models: the model states; rank 0 first.
        optims: each rank's partition of master weights and optimizer state; empty in stage 0.
    """

    def __init__(self, models: Sequence[LazyCheckpoint], optims: Sequence[LazyCheckpoint]) -> None:
        self._models = models
        self._optims = optims
        self._first = models[0]
        self._states = [self._state_of(each) for each in optims]
        count = self._value(self._first, "dp_world_size")
        if optims and isinstance(count, int) and count != len(optims):
            raise CheckpointNotFoundError(
                f"it was saved by {count} ranks, but contains the files of {len(optims)} ranks."
            )

    def tree(self, wanted: Collection[str]) -> StateTree:
        """Return the parts in ``wanted``: weights, optimizer state and the parts in the client state."""
        tree = self.client_state_parts()
        client_state = tree.pop("optimizer", None)
        if "state_dict" in wanted:
            tree["state_dict"] = self.weights()
        state = self.optimizer() if "optimizer" in wanted else None
        if state is not None:
            tree["optimizer"] = state if client_state is None else _with_names(client_state, state)
        return tree

    def weights(self) -> dict[str, Tensor]:
        """Return parameters and buffers by name; parameters in float32 if there are master weights."""
        module = self._value(self._first, "module") or {}
        master_weights = self._master_weights()
        if not self._is_stage3:
            # Tied parameters share one master weight, stored under the first name.
            by_storage = {_storage_key(module[name]): master_weight for name, master_weight in master_weights.items()}
            return {name: by_storage.get(_storage_key(value), value) for name, value in module.items()}
        # In stage 3, the parameters of the modules are empty; only buffers have values.
        buffers = {name: module[name] for name in self._value(self._first, "buffer_names") or ()}
        values = {**self._frozen(), **master_weights, **buffers}
        for alias, name in dict(self._value(self._first, "shared_params") or {}).items():
            values.setdefault(alias, values[name])
        missing = [name for name in module if name not in values]
        if missing:
            raise CheckpointDamagedError(
                f"no values were found for {missing[0]!r} and {len(missing) - 1} other parameters."
            )
        return {name: values[name] for name in module}

    def optimizer(self) -> dict[str, Any] | None:
        """Return the optimizer state by parameter name, or by index if the names are unknown; None if there is none."""
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
                "its optimizer state has an old or elastic format, which is not supported; only its weights can be loaded."
            )
        slots: dict[str, dict[str, Any]] = {}
        partitions = self._partitions()
        for index, partition in enumerate(partitions):
            self._collect_state(index, partition, slots)
        groups = [self._group(number, group, partitions) for number, group in enumerate(base["param_groups"])]
        scaler = get_nested(self._states[0], "loss_scaler")
        return {"state": slots, "param_groups": groups, "counts": counts, **_loss_scale(_attributes(scaler))}

    def client_state_parts(self) -> StateTree:
        """Return the parts that DeepSpeedStrategy added to the client state."""
        client_state = self._value(self._first, DEEPSPEED_STATE)
        return dict(client_state) if isinstance(client_state, Mapping) else {}

    def _state_of(self, checkpoint: LazyCheckpoint) -> Mapping[Any, Any]:
        return mapping_items(checkpoint.entries.get("optimizer_state_dict")) or {}

    @staticmethod
    def _value(checkpoint: LazyCheckpoint, key: str) -> Any:
        return checkpoint.read(checkpoint.entries[key], key) if key in checkpoint.entries else None

    def _part(self, rank: int, key: str) -> Any:
        if key not in self._states[rank]:
            return None
        return self._optims[rank].read(self._states[rank][key], key)

    def _base(self, rank: int) -> Any:
        return self._part(rank, "optimizer_state_dict" if self._is_stage3 else "base_optimizer_state")

    @property
    def _is_stage3(self) -> bool:
        return bool(self._states) and "fp32_flat_groups" in self._states[0]

    def _partitions(self) -> list[ZeroPartition]:
        shapes = self._value(self._first, "param_shapes")
        if not isinstance(shapes, list):
            raise CheckpointError(
                "it does not record the shapes of its parameters; it was saved by an old DeepSpeed version."
            )
        if self._is_stage3:
            return [PerParameterPartition(each) for each in shapes]
        paddings = self._part(0, "param_alignment_paddings") or [()] * len(shapes)
        return [FlatPartition(each, tuple(padding)) for each, padding in zip(shapes, paddings, strict=True)]

    def _master_weights(self) -> dict[str, Tensor]:
        if not self._states:
            return self._stage0_master_weights()
        key = "fp32_flat_groups" if self._is_stage3 else "single_partition_of_fp32_groups"
        flat_tensors = [self._part(rank, key) for rank in range(len(self._states))]
        found: dict[str, Tensor] = {}
        for index, partition in enumerate(self._partitions()):
            found.update(partition.gather([each[index].detach() for each in flat_tensors]))
        return found

    def _stage0_master_weights(self) -> dict[str, Tensor]:
        """Return the master weights of stage 0 by name; empty if their names cannot be determined from their order."""
        state = self._value(self._first, "optimizer")
        groups = (state.get("fp32_groups") if isinstance(state, Mapping) else None) or []
        master_weights = [master_weight.detach() for group in groups for master_weight in group]
        names = self.client_state_parts().get("optimizer", {}).get("trained") or self._parameters_in_order()
        module = self._value(self._first, "module")
        matches = len(names) == len(master_weights) and all(
            module[name].shape == master_weight.shape for name, master_weight in zip(names, master_weights, strict=True)
        )
        return dict(zip(names, master_weights, strict=True)) if matches else {}

    def _parameters_in_order(self) -> list[str]:
        buffers = set(self._value(self._first, "buffer_names") or ())
        module = self._value(self._first, "module")
        first = {_storage_key(value): name for name, value in reversed(module.items()) if name not in buffers}
        return [name for name, value in module.items() if first.get(_storage_key(value)) == name]

    def _frozen(self) -> dict[str, Tensor]:
        shapes = self._value(self._first, "frozen_param_shapes") or {}
        fragments = [self._value(each, "frozen_param_fragments") or {} for each in self._models]
        found: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            found.update(PerParameterPartition({name: shape}).gather([each[name] for each in fragments]))
        return found

    def _collect_state(self, index: int, partition: ZeroPartition, slots: dict[str, dict[str, Any]]) -> None:
        """Add the optimizer state of a flat tensor to the state of each parameter in the flat tensor."""
        states = [self._base(rank)["state"].get(index, {}) for rank in range(len(self._states))]
        for key, first in states[0].items():
            elementwise = isinstance(first, Tensor) and first.ndim == 1 and key not in _PER_TENSOR_STATE
            if elementwise:
                for name, tensor in partition.gather([each[key] for each in states]):
                    slots.setdefault(name, {})[key] = tensor
            else:
                for name in partition.shapes:
                    slots.setdefault(name, {})[key] = first

    def _group(self, number: int, group: Mapping[str, Any], partitions: Sequence[ZeroPartition]) -> dict[str, Any]:
        """Return a group's options, with parameter names instead of its flat tensors."""
        names = [name for index in group["params"] for name in partitions[index].shapes]
        frozen = self._value(self._first, "frozen_param_shapes") or {}
        if len(self._base(0)["param_groups"]) == 1:
            # If there is only one group, add the frozen parameters to it, as in other strategies.
            names += [name for name in frozen if name not in names]
        return {**{key: value for key, value in group.items() if key not in _EXCLUDED_OPTIONS}, "params": names}

    def _counts(self) -> dict[str, int]:
        steps, skipped = (self._value(self._first, key) or 0 for key in ("global_steps", "skipped_steps"))
        config = self._value(self._first, "ds_config")
        accumulated = config.get("gradient_accumulation_steps", 1) if isinstance(config, Mapping) else 1
        accumulated = accumulated if isinstance(accumulated, int) else 1
        return {"inner_count": steps * accumulated, "attempts": steps, "updates": steps - skipped, "pending": 0}


def _storage_key(value: Any) -> Any:
    """Return the storage of a tensor as a key; tied parameters have the same key."""
    return (value.data_ptr(), value.shape) if isinstance(value, Tensor) and value.numel() else id(value)


def _with_names(client_state: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state keyed by the parameter names that DeepSpeedStrategy stored, with its counters."""
    names = client_state["trained"]
    slots = {names[key] if isinstance(key, int) else key: value for key, value in state["state"].items()}
    return {**{key: value for key, value in client_state.items() if key != "trained"}, "state": slots}


def _attributes(node: Any) -> Mapping[Any, Any]:
    """Return the attributes of a pickled object without creating the object."""
    return (mapping_items(node.state) or {}) if isinstance(node, PickledObject) else {}


def _loss_scale(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the loss scale in the format of torch's ``GradScaler``; empty if it is static."""
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
