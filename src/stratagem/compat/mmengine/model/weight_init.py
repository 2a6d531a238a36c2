"""Initializers of weights, and the options ``init_cfg`` that select them.

The initializers draw random numbers in MMEngine's order and with its formulas, so that the same seed gives the same weights.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from torch import Tensor, nn, no_grad

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.registry import WEIGHT_INITIALIZERS, build_from_cfg
from stratagem.errors import ConfigTypeError, ConfigValueError, StateError
from stratagem.utils.imports import import_object

__all__ = [
    "BaseInit",
    "Caffe2XavierInit",
    "ConstantInit",
    "KaimingInit",
    "NormalInit",
    "PretrainedInit",
    "TruncNormalInit",
    "UniformInit",
    "XavierInit",
    "bias_init_with_prob",
    "caffe2_xavier_init",
    "constant_init",
    "initialize",
    "kaiming_init",
    "normal_init",
    "trunc_normal_",
    "trunc_normal_init",
    "uniform_init",
    "update_init_info",
    "xavier_init",
]

# The package `runner` imports this one, so its functions are imported on first use.
_CHECKPOINTS: Final = "stratagem.compat.mmengine.runner.checkpoint"
_LOAD: Final = f"{_CHECKPOINTS}:load_checkpoint"
_LOAD_PREFIX: Final = f"{_CHECKPOINTS}:_load_checkpoint_with_prefix"
_LOAD_STATE: Final = f"{_CHECKPOINTS}:load_state_dict"


def mean_of(parameter: Tensor) -> Tensor:
    """Return the mean of a parameter on the CPU, from which a change of its values is detected."""
    values = parameter.detach()
    return (values if values.is_floating_point() or values.is_complex() else values.float()).mean().cpu()


def update_init_info(module: nn.Module, init_info: str) -> None:
    """Record what has initialized the parameters of a module whose mean has changed since the last call.

    Args:
        module: a module for which ``BaseModule.init_weights`` is running.
        init_info: a description of the initialization.
    """
    require(hasattr(module, "_params_init_info"), f"{type(module).__name__} has no _params_init_info: {module}")
    records: Any = module._params_init_info
    for name, parameter in module.named_parameters():
        require(
            parameter in records,
            f"init_weights of {type(module).__name__} has replaced or added the parameter {name}. Create parameters in "
            "__init__ and change only their values in init_weights.",
        )
        mean = mean_of(parameter)
        if records[parameter]["tmp_mean_value"] != mean:
            records[parameter].update(init_info=init_info, tmp_mean_value=mean)


def _weight_of(module: nn.Module) -> Tensor | None:
    weight: Tensor | None = getattr(module, "weight", None)
    return weight


def _fill_bias(module: nn.Module, bias: float) -> None:
    if getattr(module, "bias", None) is not None:
        nn.init.constant_(module.bias, bias)  # type: ignore[arg-type]


def constant_init(module: nn.Module, val: float, bias: float = 0) -> None:
    """Fill the weight of a module with ``val`` and its bias with ``bias``."""
    if (weight := _weight_of(module)) is not None:
        nn.init.constant_(weight, val)
    _fill_bias(module, bias)


def xavier_init(module: nn.Module, gain: float = 1, bias: float = 0, distribution: str = "normal") -> None:
    """Initialize the weight of a module by Glorot and Bengio's method, with a uniform or normal distribution."""
    _require_distribution(distribution)
    if (weight := _weight_of(module)) is not None:
        draw = nn.init.xavier_uniform_ if distribution == "uniform" else nn.init.xavier_normal_
        draw(weight, gain=gain)
    _fill_bias(module, bias)


def normal_init(module: nn.Module, mean: float = 0, std: float = 1, bias: float = 0) -> None:
    """Initialize the weight of a module with a normal distribution."""
    if (weight := _weight_of(module)) is not None:
        nn.init.normal_(weight, mean, std)
    _fill_bias(module, bias)


def trunc_normal_init(
    module: nn.Module, mean: float = 0, std: float = 1, a: float = -2, b: float = 2, bias: float = 0
) -> None:
    """Initialize the weight of a module with a normal distribution that is truncated to ``[a, b]``."""
    if (weight := _weight_of(module)) is not None:
        trunc_normal_(weight, mean, std, a, b)
    _fill_bias(module, bias)


def uniform_init(module: nn.Module, a: float = 0, b: float = 1, bias: float = 0) -> None:
    """Initialize the weight of a module with a uniform distribution over ``[a, b]``."""
    if (weight := _weight_of(module)) is not None:
        nn.init.uniform_(weight, a, b)
    _fill_bias(module, bias)


def kaiming_init(
    module: nn.Module,
    a: float = 0,
    mode: str = "fan_out",
    nonlinearity: str = "relu",
    bias: float = 0,
    distribution: str = "normal",
) -> None:
    """Initialize the weight of a module by He's method, with a uniform or normal distribution."""
    _require_distribution(distribution)
    if (weight := _weight_of(module)) is not None:
        draw: Callable[..., Tensor] = nn.init.kaiming_normal_
        if distribution == "uniform":
            draw = nn.init.kaiming_uniform_
        draw(weight, a=a, mode=mode, nonlinearity=nonlinearity)
    _fill_bias(module, bias)


def caffe2_xavier_init(module: nn.Module, bias: float = 0) -> None:
    """Initialize the weight of a module as ``XavierFill`` of Caffe2 does."""
    kaiming_init(module, a=1, mode="fan_in", nonlinearity="leaky_relu", bias=bias, distribution="uniform")


def bias_init_with_prob(prior_prob: float) -> float:
    """Return the bias with which a sigmoid is ``prior_prob``."""
    return float(-np.log((1 - prior_prob) / prior_prob))


def trunc_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Tensor:
    """Fill a tensor with a normal distribution that is truncated to ``[a, b]``, and return it.

    The values are computed from uniform numbers with the inverse of the distribution function.
    """
    if mean < a - 2 * std or mean > b + 2 * std:
        warnings.warn(
            f"trunc_normal_: the mean {mean} is more than two standard deviations ({std}) away from [{a}, {b}], so the "
            "distribution may be inaccurate.",
            stacklevel=2,
        )
    low, high = (0.5 * (1.0 + math.erf((bound - mean) / std / math.sqrt(2.0))) for bound in (a, b))
    with no_grad():
        tensor.uniform_(2 * low - 1, 2 * high - 1)
        tensor.erfinv_().mul_(std * math.sqrt(2.0)).add_(mean)
        return tensor.clamp_(min=a, max=b)


def _require_distribution(distribution: str) -> None:
    require(distribution in ("uniform", "normal"), f'distribution={distribution!r} must be "uniform" or "normal".')


class BaseInit:
    """Base class of initializers, which initialize some of the submodules of a module.

    Args:
        bias: the value of biases.
        bias_prob: if set, biases get the value with which a sigmoid is this probability.
        layer: the names of the classes to initialize; a direct base class of a submodule matches, too.

    Attributes:
        wholemodule: whether to initialize all submodules, whatever their class.
    """

    def __init__(
        self, *, bias: float = 0, bias_prob: float | None = None, layer: str | Sequence[str] | None = None
    ) -> None:
        if not isinstance(bias, int | float):
            raise ConfigTypeError(f"bias must be a number, got {bias!r}.")
        if bias_prob is not None and not isinstance(bias_prob, float):
            raise ConfigTypeError(f"bias_prob must be a float, got {bias_prob!r}.")
        if layer is not None and not isinstance(layer, str | list):
            raise ConfigTypeError(f"layer must be the name of a class or a list of names, got {layer!r}.")
        self.wholemodule = False
        self.bias = bias if bias_prob is None else bias_init_with_prob(bias_prob)
        self.layer = [layer] if isinstance(layer, str) else list(layer or ())

    def _selects(self, module: nn.Module) -> bool:
        """Return whether a submodule is to be initialized."""
        if self.wholemodule:
            return True
        return any(each.__name__ in self.layer for each in (type(module), *type(module).__bases__))

    def _get_init_info(self) -> str:
        return f"{type(self).__name__}, bias={self.bias}"


class _FunctionInit(BaseInit):
    """An initializer that calls a function for each selected submodule.

    Attributes:
        options: the names of the attributes that are passed to the function, in the order of its arguments.
    """

    options: tuple[str, ...] = ()

    def __call__(self, module: nn.Module) -> None:
        """Initialize the selected submodules in the order of ``module.apply``."""

        def initialize_one(each: nn.Module) -> None:
            if self._selects(each):
                self._initialize(each, **{name: getattr(self, name) for name in self.options}, bias=self.bias)

        module.apply(initialize_one)
        _record(self, module)

    def _initialize(self, module: nn.Module, **options: Any) -> None:
        raise NotImplementedError

    def _get_init_info(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in (*self.options, "bias"))
        return f"{type(self).__name__}: {shown}"


def _record(initializer: Any, module: nn.Module) -> None:
    if hasattr(module, "_params_init_info"):
        update_init_info(module, init_info=initializer._get_init_info())


@WEIGHT_INITIALIZERS.register_module(name="Constant")
class ConstantInit(_FunctionInit):
    """Fill weights with a constant.

    Args:
        val: the constant.
        kwargs: see ``BaseInit``.
    """

    options = ("val",)
    _initialize = staticmethod(constant_init)  # type: ignore[assignment]

    def __init__(self, val: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.val = val


@WEIGHT_INITIALIZERS.register_module(name="Xavier")
class XavierInit(_FunctionInit):
    """Initialize weights by Glorot and Bengio's method.

    Args:
        gain: the factor of the standard deviation.
        distribution: ``"uniform"`` or ``"normal"``.
        kwargs: see ``BaseInit``.
    """

    options = ("gain", "distribution")
    _initialize = staticmethod(xavier_init)  # type: ignore[assignment]

    def __init__(self, gain: float = 1, distribution: str = "normal", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gain = gain
        self.distribution = distribution


@WEIGHT_INITIALIZERS.register_module(name="Normal")
class NormalInit(_FunctionInit):
    """Initialize weights with a normal distribution.

    Args:
        mean: the mean.
        std: the standard deviation.
        kwargs: see ``BaseInit``.
    """

    options = ("mean", "std")
    _initialize = staticmethod(normal_init)  # type: ignore[assignment]

    def __init__(self, mean: float = 0, std: float = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean = mean
        self.std = std


@WEIGHT_INITIALIZERS.register_module(name="TruncNormal")
class TruncNormalInit(_FunctionInit):
    """Initialize weights with a truncated normal distribution.

    Args:
        mean: the mean before truncation.
        std: the standard deviation before truncation.
        a: the lower bound.
        b: the upper bound.
        kwargs: see ``BaseInit``.
    """

    options = ("a", "b", "mean", "std")
    _initialize = staticmethod(trunc_normal_init)  # type: ignore[assignment]

    def __init__(self, mean: float = 0, std: float = 1, a: float = -2, b: float = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean = mean
        self.std = std
        self.a = a
        self.b = b


@WEIGHT_INITIALIZERS.register_module(name="Uniform")
class UniformInit(_FunctionInit):
    """Initialize weights with a uniform distribution.

    Args:
        a: the lower bound.
        b: the upper bound.
        kwargs: see ``BaseInit``.
    """

    options = ("a", "b")
    _initialize = staticmethod(uniform_init)  # type: ignore[assignment]

    def __init__(self, a: float = 0, b: float = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.a = a
        self.b = b


@WEIGHT_INITIALIZERS.register_module(name="Kaiming")
class KaimingInit(_FunctionInit):
    """Initialize weights by He's method.

    Args:
        a: the negative slope of the rectifier after the layer.
        mode: ``"fan_in"`` or ``"fan_out"``.
        nonlinearity: the name of the function after the layer.
        distribution: ``"uniform"`` or ``"normal"``.
        kwargs: see ``BaseInit``.
    """

    options = ("a", "mode", "nonlinearity", "distribution")
    _initialize = staticmethod(kaiming_init)  # type: ignore[assignment]

    def __init__(
        self,
        a: float = 0,
        mode: str = "fan_out",
        nonlinearity: str = "relu",
        distribution: str = "normal",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.a = a
        self.mode = mode
        self.nonlinearity = nonlinearity
        self.distribution = distribution


@WEIGHT_INITIALIZERS.register_module(name="Caffe2Xavier")
class Caffe2XavierInit(KaimingInit):
    """Initialize weights as ``XavierFill`` of Caffe2 does; see ``BaseInit`` for the arguments."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(a=1, mode="fan_in", nonlinearity="leaky_relu", distribution="uniform", **kwargs)


@WEIGHT_INITIALIZERS.register_module(name="Pretrained")
class PretrainedInit:
    """Load the weights of a module from a checkpoint; parameters that the checkpoint lacks keep their values.

    Args:
        checkpoint: a path or an address.
        prefix: use only the parameters below this name, such as ``"backbone."``, and remove it from their names.
        map_location: the device on which the checkpoint is loaded.
    """

    def __init__(self, checkpoint: str, prefix: str | None = None, map_location: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.map_location = map_location

    def __call__(self, module: nn.Module) -> None:
        """Load the weights into a module."""
        what = "the model" if self.prefix is None else f"{self.prefix!r} of the model"
        print_log(f"Loading {what} from {self.checkpoint}", logger="current")
        options: dict[str, Any] = {"strict": False, "logger": "current"}
        if self.prefix is None:
            import_object(_LOAD)(module, self.checkpoint, map_location=self.map_location, **options)
        else:
            state = import_object(_LOAD_PREFIX)(self.prefix, self.checkpoint, map_location=self.map_location)
            import_object(_LOAD_STATE)(module, state, **options)
        _record(self, module)

    def _get_init_info(self) -> str:
        return f"{type(self).__name__}: load from {self.checkpoint}"


def initialize(module: nn.Module, init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Initialize a module with the initializers of one or more configurations, in their order.

    Args:
        module: the module.
        init_cfg: the configuration of an initializer, or a list of them. Its key ``override`` contains configurations, each
            for the submodule that it names under ``name``; without a ``type``, they use the initializer around them.

    Raises:
        ConfigTypeError: if a configuration has another type.
        ConfigValueError: if an override has no name, or options without a type.
        StateError: if the module has no submodule with the name of an override.
    """
    for cfg in _as_list("init_cfg", init_cfg):
        options = copy.deepcopy(cfg)
        override = options.pop("override", None)
        _run(module, options)
        if override is not None:
            options.pop("layer", None)
            _initialize_override(module, override, options)


def _as_list(name: str, given: Any) -> list[Any]:
    if not isinstance(given, dict | list):
        raise ConfigTypeError(f"{name} must be a configuration or a list of configurations, got {given!r}.")
    return [given] if isinstance(given, dict) else given


def _run(module: nn.Module, cfg: Mapping[str, Any], *, wholemodule: bool = False) -> None:
    initializer = build_from_cfg(cfg, WEIGHT_INITIALIZERS)
    initializer.wholemodule = wholemodule
    initializer(module)


def _initialize_override(module: nn.Module, override: Any, cfg: Mapping[str, Any]) -> None:
    for given in _as_list("override", override):
        options = copy.deepcopy(given)
        name = options.pop("name", None)
        if name is None:
            raise ConfigValueError(f"override={given!r} has no name. Add the name of a submodule: name=...")
        if not options:
            options.update(cfg)
        elif "type" not in options:
            raise ConfigValueError(f"override={given!r} has options but no type. Add the type of an initializer.")
        if not hasattr(module, name):
            raise StateError(
                f"{type(module).__name__} has no submodule {name!r}, which override={given!r} initializes."
            )
        _run(getattr(module, name), options, wholemodule=True)
