"""The constructor of optimizer wrappers, with rules for each parameter."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import nn
from torch.nn import GroupNorm, LayerNorm, Parameter

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.optim.optimizer.optimizer_wrapper import OptimWrapper
from stratagem.compat.mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from stratagem.compat.mmengine.utils.dl_utils import mmcv_full_available
from stratagem.compat.mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm, _InstanceNorm
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.utils.imports import import_object

__all__ = ["DefaultOptimWrapperConstructor"]

_NORMS = (_BatchNorm, _InstanceNorm, GroupNorm, LayerNorm)
# Rules that multiply the weight decay, which the optimizer must therefore specify.
_DECAY_RULES = ("bias_decay_mult", "norm_decay_mult", "dwconv_decay_mult")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DefaultOptimWrapperConstructor:
    """Build an optimizer wrapper for a model.

    ``stratagem.optim`` has a constructor that combines parameters with the same options into one group. This one makes a group
    for each parameter if there are rules, because MMEngine's checkpoints contain these groups, and users override
    ``add_params``.

    Args:
        optim_wrapper_cfg: the configuration of the wrapper, with that of the optimizer under ``optimizer``.
        paramwise_cfg: rules for parameters. ``custom_keys`` maps parts of names to ``lr_mult``, ``decay_mult`` and options of
            the group; the longest match applies, and excludes the other rules: ``bias_lr_mult``, ``bias_decay_mult``,
            ``norm_decay_mult``, ``dwconv_decay_mult``, ``flat_decay_mult`` and ``dcn_offset_lr_mult``. With
            ``bypass_duplicate``, a parameter that several modules share is used once.

    Raises:
        ConfigTypeError: if an argument is not a dict.
        ConfigValueError: if a rule multiplies the weight decay and the optimizer's configuration has none.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        if not isinstance(optim_wrapper_cfg, dict):
            raise ConfigTypeError(f"optim_wrapper_cfg must be a dict, got {optim_wrapper_cfg!r}.")
        require("optimizer" in optim_wrapper_cfg, f"optim_wrapper_cfg={optim_wrapper_cfg!r} has no 'optimizer'.")
        self.optim_wrapper_cfg = optim_wrapper_cfg.copy()
        self.optimizer_cfg = self.optim_wrapper_cfg.pop("optimizer")
        self.paramwise_cfg = {} if paramwise_cfg is None else paramwise_cfg
        self.base_lr = self.optimizer_cfg.get("lr", None)
        self.base_wd = self.optimizer_cfg.get("weight_decay", None)
        self._validate_cfg()

    def _validate_cfg(self) -> None:
        """Check the rules."""
        if not isinstance(self.paramwise_cfg, dict):
            raise ConfigTypeError(f"paramwise_cfg must be a dict, got {self.paramwise_cfg!r}.")
        custom_keys = self.paramwise_cfg.get("custom_keys", {})
        if not isinstance(custom_keys, dict):
            raise ConfigTypeError(f"custom_keys must be a dict, got {custom_keys!r}.")
        rules = [rule for rule in _DECAY_RULES if rule in self.paramwise_cfg]
        rules += [f"custom_keys[{key!r}]" for key, options in custom_keys.items() if "decay_mult" in options]
        if rules and self.base_wd is None:
            raise ConfigValueError(
                f"paramwise_cfg: {rules[0]} multiplies weight_decay, which the optimizer's configuration does not set. Add "
                "weight_decay=..."
            )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Return the wrapper for a model."""
        module: Any = model.module if hasattr(model, "module") else model
        options = self.optimizer_cfg.copy()
        optimizer_type = options["type"]
        if isinstance(optimizer_type, str):
            with OPTIMIZERS.switch_scope_and_registry(None) as registry:
                optimizer_type = registry.get(optimizer_type)
        first_argument = next(iter(inspect.signature(optimizer_type).parameters)) if optimizer_type else "params"
        options[first_argument] = module.parameters()
        if self.paramwise_cfg:
            groups: list[dict[str, Any]] = []
            self.add_params(groups, module)
            options[first_argument] = groups
        optimizer = OPTIMIZERS.build(options)
        wrapper = self.optim_wrapper_cfg.copy()
        wrapper.setdefault("type", "OptimWrapper")
        built: OptimWrapper = OPTIM_WRAPPERS.build(wrapper, default_args={"optimizer": optimizer})
        return built

    def add_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str = "",
        is_dcn_module: bool | float | None = None,
    ) -> None:
        """Append a group for each trainable parameter of a module and its submodules.

        Args:
            params: the groups, modified in place.
            module: the module.
            prefix: the name of the module.
            is_dcn_module: whether the parent of the module is a deformable convolution.
        """
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}" if prefix else name
            group: dict[str, Any] = {"params": [parameter]}
            if self.paramwise_cfg.get("bypass_duplicate", False) and self._is_in(group, params):
                _warn(f"{full_name} is the parameter of another module, too, and is skipped here.")
                continue
            if not parameter.requires_grad:
                _warn(f"{full_name} is skipped since its requires_grad=False.")
                continue
            group.update(self._options_of(module, f"{prefix}.{name}", parameter, bool(is_dcn_module)))
            params.append(group)
            for key, value in group.items():
                if key != "params":
                    print_log(f"paramwise_options -- {full_name}:{key}={value}", logger="current")
        is_dcn = _is_deformable(module)
        for child_name, child in module.named_children():
            self.add_params(params, child, f"{prefix}.{child_name}" if prefix else child_name, is_dcn)

    def _options_of(self, module: nn.Module, name: str, parameter: Parameter, in_dcn: bool) -> dict[str, Any]:
        """Return the options of the group of a parameter."""
        custom_keys = self.paramwise_cfg.get("custom_keys", {})
        for key in sorted(custom_keys, key=lambda each: (-len(each), each)):
            if key in name:
                return self._custom_options(custom_keys[key])
        options = {}
        lr_mult = self._lr_mult(module, name, in_dcn)
        if lr_mult is not None:
            options["lr"] = self.base_lr * lr_mult
        decay_mult = self._decay_mult(module, name, parameter, in_dcn)
        if decay_mult is not None and self.base_wd is not None:
            options["weight_decay"] = self.base_wd * decay_mult
        return options

    def _custom_options(self, custom: dict[str, Any]) -> dict[str, Any]:
        options = {}
        if self.base_lr is not None:
            options["lr"] = self.base_lr * custom.get("lr_mult", 1.0)
        elif "lr_mult" in custom:
            raise ConfigValueError(
                "custom_keys: lr_mult multiplies lr, which the optimizer's configuration does not set. Add lr=..."
            )
        if self.base_wd is not None:
            options["weight_decay"] = self.base_wd * custom.get("decay_mult", 1.0)
        # As in MMEngine, groups contain the multipliers as well.
        return {**options, **custom}

    def _lr_mult(self, module: nn.Module, name: str, in_dcn: bool) -> Any:
        rules = self.paramwise_cfg
        path, _, own_name = name.rpartition(".")
        offset = rules.get("dcn_offset_lr_mult")
        if offset is not None and in_dcn and "conv_offset" in path and isinstance(module, nn.Conv2d):
            return offset
        return (
            rules.get("bias_lr_mult") if own_name == "bias" and not isinstance(module, _NORMS) and not in_dcn else None
        )

    def _decay_mult(self, module: nn.Module, name: str, parameter: Parameter, in_dcn: bool) -> Any:
        rules = self.paramwise_cfg
        applies = {
            "norm_decay_mult": isinstance(module, _NORMS),
            "bias_decay_mult": name.rpartition(".")[2] == "bias" and not in_dcn,
            "dwconv_decay_mult": isinstance(module, nn.Conv2d) and module.in_channels == module.groups,
            "flat_decay_mult": parameter.ndim == 1 and not in_dcn,
        }
        return next((rules[key] for key, does in applies.items() if does and rules.get(key) is not None), None)

    def _is_in(self, param_group: dict[str, Any], param_group_list: list[dict[str, Any]]) -> bool:
        """Return whether a parameter of a group is in one of several groups."""
        used = {id(parameter) for group in param_group_list for parameter in group["params"]}
        return any(id(parameter) in used for parameter in param_group["params"])


def _is_deformable(module: nn.Module) -> bool:
    if not mmcv_full_available():
        return False
    kinds = tuple(import_object(f"mmcv.ops:{name}") for name in ("DeformConv2d", "ModulatedDeformConv2d"))
    return isinstance(module, kinds)


def _warn(message: str) -> None:
    print_log(message, logger="current", level=logging.WARNING)
