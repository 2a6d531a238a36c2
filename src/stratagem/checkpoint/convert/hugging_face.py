"""Write the transformers or PEFT model of a checkpoint as a folder that ``from_pretrained`` opens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

from torch import Tensor, nn

from stratagem.checkpoint.convert.weights import load_exported_weights
from stratagem.checkpoint.errors import save_error
from stratagem.errors import CheckpointError
from stratagem.model import unwrap_model
from stratagem.storage import atomic_directory
from stratagem.utils import absolute, did_you_mean
from stratagem.utils.imports import import_module
from stratagem.utils.module_names import canonical_names

__all__ = ["HuggingFaceFolder", "export_hugging_face"]

# The maximum number of names in an error.
_SHOWN = 5


@final
@dataclass(frozen=True, slots=True)
class HuggingFaceFolder:
    """What :func:`export_hugging_face` wrote.

    Attributes:
        model: the class of the exported model.
        module: its name in the trained model; "" if it is the whole model.
        is_adapter: whether the folder contains only an adapter, which ``PeftModel.from_pretrained`` opens.
        averaged: whether the weights are the averaged weights.
        files: the names of the files.
        left_out: the names of parameters and buffers of the trained model that are outside of the exported model.
    """

    model: str
    module: str
    is_adapter: bool
    averaged: bool
    files: list[str]
    left_out: list[str]


def export_hugging_face(
    source: str | Path,
    target: str | Path,
    model: nn.Module,
    *,
    module: str | None = None,
    tokenizer: str | Path | None = None,
    merge_adapters: bool = False,
    raw: bool = False,
) -> HuggingFaceFolder:
    """Load a checkpoint into ``model``, and write the transformers model in it as a folder for ``from_pretrained``.

    The folder contains the configuration, the generation configuration if the model has one, the weights under their names in
    transformers, and the files of the tokenizer. It is opened with ``from_pretrained`` and compared before it is published.

    Args:
        source: the checkpoint to read, a path or a URL, saved under any strategy.
        target: the folder to write; it must not exist.
        model: the model that was trained, or an equal one. Its weights are replaced, and adapters are merged in place.
        module: the name of the module to export; "." is the model itself. By default, the transformers model that
            contains all parameters.
        tokenizer: a folder or name that ``AutoTokenizer.from_pretrained`` opens, whose files are added.
        merge_adapters: whether to add PEFT adapters to the weights of the base model. By default, only the adapter is written.
        raw: whether to write the trained weights even if the run averaged its weights.

    Raises:
        CheckpointError: if ``target`` exists, the checkpoint does not match the model, or the model cannot be exported.
    """
    path = absolute(target)
    if path.exists():
        raise CheckpointError(f"{path} already exists. Choose a different target, or remove it first.")
    trained = unwrap_model(model)
    name, network = _chosen(trained, module)
    left_out = _outside(trained, network, required=module is None, name=name)
    averaged = load_exported_weights(trained, source, raw=raw)
    network.eval()
    exported: Any = network
    has_adapter = _is_peft(network) or _has_added_adapter(network)
    if merge_adapters:
        if not has_adapter:
            raise CheckpointError(
                f"merge_adapters: {type(network).__name__} is not a PeftModel and has no adapters to merge. Omit the option."
            )
        exported = exported.merge_and_unload() if _is_peft(network) else _merged(network)
    elif has_adapter:
        _require_adapter_is_whole(network)
    try:
        with atomic_directory(path) as temporary:
            _save(exported, temporary)
            if tokenizer is not None:
                _save_tokenizer(tokenizer, temporary)
            if merge_adapters or not has_adapter:
                _verify(exported, temporary)
            files = sorted(file.name for file in temporary.iterdir())
    except OSError as error:
        raise save_error(path, error) from error
    return HuggingFaceFolder(
        type(exported).__name__, name, has_adapter and not merge_adapters, averaged, files, left_out
    )


def _is_instance(module: nn.Module, where: str, name: str) -> bool:
    # An instance exists only if its library has been imported.
    cls = getattr(sys.modules.get(where), name, None)
    return isinstance(cls, type) and isinstance(module, cls)


def _is_peft(module: nn.Module) -> bool:
    return _is_instance(module, "peft.peft_model", "PeftModel")


def _has_added_adapter(module: nn.Module) -> bool:
    """Return whether a transformers model has adapters that its method ``add_adapter`` added, without a ``PeftModel``."""
    return _can_export(module) and bool(getattr(module, "_hf_peft_config_loaded", False))


def _merged(network: Any) -> nn.Module:
    """Add the adapters of ``add_adapter`` to the weights of their layers, and remove them, in place."""
    layer_type = sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer
    for name, layer in list(network.named_modules()):
        if isinstance(layer, layer_type):
            layer.merge()
            network.set_submodule(name, layer.get_base_layer())
    network._hf_peft_config_loaded = False
    del network.peft_config
    return cast("nn.Module", network)


def _can_export(module: nn.Module) -> bool:
    return _is_peft(module) or _is_instance(module, "transformers.modeling_utils", "PreTrainedModel")


def _outermost(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that can be exported and are not inside another one."""
    if _can_export(module):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _outermost(child, f"{name}.{key}" if name else key)


def _chosen(model: nn.Module, module: str | None) -> tuple[str, nn.Module]:
    canonical = canonical_names(model)
    found = {canonical(name): each for name, each in _outermost(model)}
    if not found:
        raise CheckpointError(
            f"{type(model).__name__} contains no model of transformers or PEFT, and therefore has no configuration for them. "
            "To write only the weights, convert to state_dict or safetensors."
        )
    if module is not None:
        named = {canonical(name): each for name, each in model.named_modules() if _can_export(each)}
        if module.removesuffix(".") not in named:
            raise CheckpointError(
                f"module={module!r} is not a transformers or PEFT model in {type(model).__name__}. {did_you_mean(module, named)}"
            )
        return module.removesuffix("."), named[module.removesuffix(".")]
    if len(found) > 1:
        names = ", ".join(f"{name} ({type(each).__name__})" for name, each in found.items())
        raise CheckpointError(
            f"{type(model).__name__} contains several models: {names}. Select one with module (--module)."
        )
    return next(iter(found.items()))


def _outside(model: nn.Module, network: nn.Module, *, required: bool, name: str) -> list[str]:
    """Return the parameters and buffers outside of the exported module.

    Raises:
        CheckpointError: if ``required`` and there are parameters among them.
    """
    canonical = canonical_names(model)
    # Tied parameters have several names.
    inside = {id(each) for each in (*network.parameters(), *network.buffers())}
    lost = [canonical(key) for key, each in model.named_parameters() if id(each) not in inside]
    if lost and required:
        raise CheckpointError(
            f"{len(lost)} parameters of {type(model).__name__} are outside of its transformers model "
            f"{name or '(the model itself)'!r} and would be lost: {_listed(lost)}. To export only this module, set "
            f"module={name!r} (--module {name})."
        )
    return lost + [canonical(key) for key, each in model.named_buffers() if id(each) not in inside]


def _require_adapter_is_whole(network: Any) -> None:
    """Require that the adapter contains everything that was trained.

    Raises:
        CheckpointError: if trainable parameters are not in the adapter.
    """
    saved = (
        sys.modules["peft"].get_peft_model_state_dict(network)
        if _is_peft(network)
        else network.get_adapter_state_dict()
    )
    kept = {value.data_ptr() for value in saved.values() if isinstance(value, Tensor)}
    lost = [name for name, each in network.named_parameters() if each.requires_grad and each.data_ptr() not in kept]
    if lost:
        raise CheckpointError(
            f"{len(lost)} trainable parameters are not part of the adapter and would be lost: {_listed(lost)}. Write the whole "
            "model with merge_adapters (--merge-adapters)."
        )


def _save(network: Any, folder: Path) -> None:
    try:
        network.save_pretrained(folder)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{type(network).__name__}.save_pretrained failed, so nothing was written: {type(error).__name__}: {error}"
        ) from error


def _save_tokenizer(tokenizer: str | Path, folder: Path) -> None:
    transformers: Any = import_module("transformers", extra="transformers")
    try:
        opened = transformers.AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"AutoTokenizer.from_pretrained cannot open the tokenizer {str(tokenizer)!r}: {error}"
        ) from error
    opened.save_pretrained(folder)


def _verify(network: nn.Module, folder: Path) -> None:
    """Open the folder with the class of the model, and compare all weights.

    Raises:
        CheckpointError: if it cannot be opened, or a weight differs.
    """
    name = type(network).__name__
    cls: Any = type(network)
    try:
        found = cls.from_pretrained(folder).state_dict()
    except Exception as error:  # the constructor of a user's class may raise any type
        raise CheckpointError(
            f"{name}.from_pretrained cannot open the folder that {name}.save_pretrained wrote, so nothing was written: "
            f"{type(error).__name__}: {error}"
        ) from error
    own = network.state_dict()
    wrong = [key for key, value in own.items() if not _equal(value, found.get(key))]
    if wrong or len(found) != len(own):
        raise CheckpointError(
            f"{name}.from_pretrained does not restore all weights that {name}.save_pretrained wrote, so nothing was written. "
            f"Different: {_listed(wrong or sorted(found.keys() - own.keys()))}. If you have replaced layers of the model, "
            "as with your own LoRA layers, put the original layers with the merged weights back before the export in Python, or "
            "write the weights as they are with --to state_dict."
        )


def _equal(value: Any, found: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(found, Tensor):
        return type(value) is type(found)
    if value.shape != found.shape:
        return False
    again = found.to(value.device, value.dtype)
    return bool(((again == value) | (again.isnan() & value.isnan())).all())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
