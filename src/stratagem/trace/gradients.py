"""Observe the gradients of the samples of this rank, before any reduction over ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from stratagem.tensors.dtensor import full_tensor, is_sharded
from stratagem.utils import canonical_names

__all__ = ["RankGradients"]


@final
class RankGradients:
    """Sums the gradients that the backward passes of an optimizer step contribute on this rank.

    Hooks on the parameters receive each contribution before it is accumulated in ``grad`` and before
    ``DistributedDataParallel`` or FSDP reduces it. FSDP computes the gradients of other parameter objects, the gathered
    parameters; they are found in the forward passes of the modules.

    Args:
        model: the model.
        name_of: returns the recorded name of a parameter.
    """

    def __init__(self, model: nn.Module, name_of: Callable[[str], str] | None = None) -> None:
        self._model = model
        self._name_of = name_of
        self._sums: dict[str, list[Tensor]] = {}
        self._hooked: dict[int, Tensor] = {}
        self._modules: set[int] = set()
        self._handles: list[Any] = []

    def watch(self) -> None:
        """Register the hooks on parameters that have none yet, such as parameters that are trainable since the last step."""
        name_of = self._name_of or canonical_names(self._model)
        for name, module in self._model.named_modules(remove_duplicate=True):
            sharded = False
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                full_name = name_of(f"{name}.{key}" if name else key)
                self._hook(full_name, parameter)
                sharded = sharded or is_sharded(parameter)
            # An FSDP module gathers the parameters of its submodules, which may not be called themselves.
            if (sharded or _is_fsdp_module(module)) and id(module) not in self._modules:
                self._modules.add(id(module))
                self._handles.append(module.register_forward_pre_hook(partial(self._find_gathered, name)))

    def take(self) -> dict[str, Tensor]:
        """Return the sums since the last call, by parameter name, and start new ones. Collective for tensor parallelism."""
        sums, self._sums = self._sums, {}
        taken = {}
        for name, parts in sums.items():
            full = [full_tensor(part) for part in parts]
            total = full[0]
            for part in full[1:]:
                total = total + part
            taken[name] = total
        return taken

    def discard(self) -> None:
        """Discard the sums since the last call of :meth:`take`."""
        self._sums = {}

    @property
    def seen(self) -> bool:
        """Whether there was a gradient since the last call of :meth:`take`."""
        return bool(self._sums)

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        self._modules.clear()

    def _hook(self, name: str, parameter: Tensor) -> None:
        # A strong reference, so that the ID is not reused.
        if parameter.requires_grad and parameter.is_leaf and id(parameter) not in self._hooked:
            self._hooked[id(parameter)] = parameter
            # Some strategies replace the method of the parameter, to refuse hooks that change gradients.
            register: Any = Tensor.register_hook
            self._handles.append(register(parameter, partial(self._add, name)))

    def _find_gathered(self, prefix: str, module: nn.Module, _: Any) -> None:
        name_of = self._name_of or canonical_names(self._model)
        for key, parameter in module.named_parameters(prefix):
            self._hook(name_of(key), parameter)

    @torch.no_grad()
    def _add(self, name: str, gradient: Tensor) -> None:
        parts = self._sums.setdefault(name, [])
        part = gradient.detach()
        if parts and not is_sharded(part) and part.layout is torch.strided:
            parts[0] = parts[0] + part
        else:
            parts.append(part.clone())


def _is_fsdp_module(module: nn.Module) -> bool:
    # Modules of this class exist only if it has been imported, which is slow.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
