"""The update of a fused torch optimizer, without the work that torch repeats in every step.

In each step, torch collects parameters and state tensors, groups them by device and dtype, opens a record for the profiler and
looks for hooks. For small models, this takes several times as long as the kernel, and torch starts a kernel for every parameter
group. For sharded parameters, it also determines the sharding of every result. :class:`PreparedUpdate` keeps the lists of
tensors, for sharded parameters those of the local shards, checks that they are still those of the optimizer, and calls the same
kernels. Parameter groups with equal options share one call. Because the kernels are elementwise, no bit changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.sgd import sgd

from stratagem.optim.mixed import MixedOptimizer
from stratagem.tensors.dtensor import is_plain, is_sharded, stored_shard
from stratagem.utils.torch_private import (
    fused_adagrad,
    fused_adam,
    fused_adamw,
    fused_sgd,
    is_step_observed,
    set_grad_enabled,
    step_function,
)

__all__ = ["PreparedParts", "PreparedUpdate"]


@final
class PreparedUpdate:
    """The update of an ``SGD``, ``Adam``, ``AdamW`` or ``Adagrad`` optimizer with ``fused=True``.

    For ``SGD``, groups with ``foreach=True`` are supported as well, since torch has no fused ``SGD`` for sharded parameters.

    :meth:`apply` returns False, without effect, if torch's own step is required:

    - a step hook, also a global one, or an active profiler,
    - a ``step`` that the class or the object replaces, as torch's learning rate schedulers do,
    - missing gradients, or gradients that are sparse or have another dtype than their parameter,
    - tensors as options, ``amsgrad``, ``maximize``, ``capturable`` or ``differentiable``,
    - ``grad_scale``, which torch's ``GradScaler`` sets, or a CUDA graph that is being captured,
    - subclasses of tensors other than ``DTensor``, gradients that are sharded unlike their parameter, and complex parameters,
    - a parameter without state, as before the first step.

    If parameters or state tensors are replaced, such as by ``load_state_dict``, the lists are collected again.

    Args:
        optimizer: the optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._kernel = _KERNELS[type(optimizer)]
        self._step = optimizer.__class__.step
        self._parts: list[_Part] = []
        self._groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._states: list[tuple[dict[str, Any], list[tuple[str, Tensor]]]] = []
        # The local shards in these lists, with the tensors that they belong to.
        self._shards: list[tuple[Tensor, Tensor]] = []
        self._steps: dict[torch.device, list[Tensor]] = {}
        self._is_on_cuda = False

    @classmethod
    def of(cls, optimizer: Optimizer) -> PreparedUpdate | PreparedParts | None:
        """Return the prepared update of an optimizer.

        The result is None if the class has none or a replaced ``step``, or if no group uses a supported implementation.
        """
        if isinstance(optimizer, MixedOptimizer):
            updates = {name: cls.of(part) for name, part in optimizer.parts.items()}
            return PreparedParts(optimizer, updates) if any(updates.values()) else None
        kernel = _KERNELS.get(type(optimizer))
        if kernel is None or step_function(type(optimizer)) is not kernel.step:
            return None
        is_supported = any(group[name] for group in optimizer.param_groups for name in kernel.implementations)
        return cls(optimizer) if is_supported else None

    def apply(self, optimizer: Optimizer) -> bool:
        """Update the parameters and their state; return whether this was possible.

        Args:
            optimizer: the optimizer that is to be updated, which a user may have replaced.
        """
        if self._apply(optimizer):
            return True
        if isinstance(optimizer, SGD):
            _start_late_momentum(optimizer)
        return False

    def _apply(self, optimizer: Optimizer) -> bool:
        attributes = optimizer.__dict__
        if optimizer is not self._optimizer or is_step_observed(optimizer):
            return False
        if "step" in attributes or optimizer.__class__.step is not self._step:
            return False
        if "grad_scale" in attributes and attributes["grad_scale"] is not None:
            return False
        found_inf = attributes.get("found_inf")
        was_enabled = torch.is_grad_enabled()
        set_grad_enabled(False)
        try:
            if not self._is_current(optimizer):
                self._prepare(optimizer)
            launches = self._collect()
            if not launches or (self._is_on_cuda and torch.cuda.is_current_stream_capturing()):
                return False
            if found_inf is not None and not all(group["fused"] for group in optimizer.param_groups):
                return False  # Only fused kernels read the flag.
            flags = {device: None if found_inf is None else found_inf.to(device) for device in self._steps}
            # Counting the steps of all groups together takes one call instead of one for each group.
            for steps in self._steps.values():
                _count_steps(steps)
            for (options, (device, _)), tensors in launches.items():
                self._kernel.launch(options, tensors, flags[device])
            for device, steps in self._steps.items():
                _revert_steps(steps, flags[device])
        finally:
            set_grad_enabled(was_enabled)
        return True

    def _is_current(self, optimizer: Any) -> bool:
        """Return whether the optimizer still has the parameters and state tensors of the lists."""
        try:
            for (known, parameters), group in zip(self._groups, optimizer.param_groups, strict=True):
                if group is not known:
                    return False
                for parameter, expected in zip(group["params"], parameters, strict=True):
                    if parameter is not expected:
                        return False
            for (own, tensors), state in zip(self._states, optimizer.state.values(), strict=True):
                if state is not own:
                    return False
                for name, tensor in tensors:
                    if state[name] is not tensor:
                        return False
            for tensor, shard in self._shards:
                if stored_shard(tensor) is not shard:
                    return False
        except (KeyError, ValueError):  # an entry was removed, or the numbers differ
            return False
        return True

    def _prepare(self, optimizer: Any) -> None:
        """Collect the lists of tensors; no part if one of the tensors is not supported."""
        parts: list[_Part] = []
        shards: list[tuple[Tensor, Tensor]] = []
        self._parts, self._shards = [], []
        self._groups = [(group, list(group["params"])) for group in optimizer.param_groups]
        names = self._kernel.state_names
        self._states = [
            (state, [(name, state[name]) for name in names if name in state]) for state in optimizer.state.values()
        ]
        for group, parameters in self._groups:
            options = self._kernel.options(group)
            if options is None:
                return
            own: dict[Any, _Part] = {}
            for parameter in parameters:
                # The state is a defaultdict, and looking up a parameter must not create an entry.
                state = optimizer.state.get(parameter, {})
                tensors: dict[str, Any] = {name: state.get(name) for name in options[0]}
                if not _is_supported(parameter, tensors):
                    return
                local = stored_shard(parameter)
                kind = local.device, local.dtype
                part = own.setdefault(kind, _Part(group, options[0], kind, [], [], [[] for _ in tensors]))
                part.parameters.append(parameter)
                part.local.append(local)
                for values, tensor in zip(part.states, map(stored_shard, tensors.values()), strict=True):
                    values.append(tensor)
                shards += [(each, stored_shard(each)) for each in (parameter, *tensors.values()) if not is_plain(each)]
            parts += own.values()
        self._parts, self._shards = parts, shards
        self._steps = {}
        for part in parts:
            counts = self._steps.setdefault(part.kind[0], [])
            if "step" in part.names:
                counts += part.states[part.names.index("step")]
        self._is_on_cuda = any(part.kind[0].type == "cuda" for part in parts)

    def _collect(self) -> dict[tuple[_Options, _Kind], Sequence[list[Tensor]]] | None:
        """Return the lists of tensors for each kernel call; None if torch's own step is required."""
        parts, options_of = self._parts, self._kernel.options
        launches: dict[tuple[_Options, _Kind], Sequence[list[Tensor]]] = {}
        for part in parts:
            options = options_of(part.group)
            if options is None or options[0] is not part.names:
                self._groups = []  # Collect the lists again in the next step.
                return None
            dtype = part.kind[1]
            gradients: Any = [parameter.grad for parameter in part.parameters]
            if self._shards:
                gradients = _local_gradients(part.parameters, gradients)
            for gradient in gradients:
                if gradient is None or gradient.dtype is not dtype or gradient.layout is not torch.strided:
                    return None
            tensors = part.local, gradients, *part.states
            key = options, part.kind
            if key not in launches:
                launches[key] = tensors if len(parts) == 1 else [[*values] for values in tensors]
            else:
                for position, values in enumerate(tensors):
                    launches[key][position].extend(values)
        return launches


@final
class PreparedParts:
    """The update of a ``MixedOptimizer``, with the prepared updates of its parts where these are possible.

    Args:
        optimizer: the optimizer.
        updates: the prepared update of each part; None for a part that always uses its own step.
    """

    def __init__(self, optimizer: MixedOptimizer, updates: Mapping[str, PreparedUpdate | PreparedParts | None]) -> None:
        self._optimizer = optimizer
        self._updates = [(optimizer.parts[name], update) for name, update in updates.items()]

    def apply(self, optimizer: Optimizer) -> bool:
        """Update all parts; return False, without effect, if the optimizer has step hooks or a replaced ``step``.

        Args:
            optimizer: the optimizer that is to be updated, which a user may have replaced.
        """
        if optimizer is not self._optimizer or is_step_observed(optimizer) or "step" in optimizer.__dict__:
            return False
        for part, update in self._updates:
            if update is None or not update.apply(part):
                part.step()
        return True


_Kind = tuple[torch.device, torch.dtype]
# The names of the state tensors and the options that a kernel receives. Groups with equal options share a call.
_Options = tuple[Any, ...]


@final
@dataclass(frozen=True, slots=True)
class _Part:
    """The parameters of a group with the same device and dtype, and their state tensors.

    Attributes:
        group: the parameter group.
        names: the names of the state tensors.
        kind: the device and the dtype.
        parameters: the parameters.
        local: the local shards of sharded parameters, and the other parameters.
        states: for each name, the state tensors of all parameters, or their local shards.
    """

    group: dict[str, Any]
    names: tuple[str, ...]
    kind: _Kind
    parameters: list[Tensor]
    local: list[Tensor]
    states: list[list[Tensor]]


def _is_supported(parameter: Tensor, states: Mapping[str, Any]) -> bool:
    """Return whether a kernel accepts the values of a parameter and its state tensors on this rank."""
    local = stored_shard(parameter)
    if not is_plain(local) or not local.is_floating_point() or local.layout is not torch.strided:
        return False
    for name, state in states.items():
        if not isinstance(state, Tensor):
            return False
        if name == "step":
            expected: tuple[Any, torch.dtype] = (), torch.float32
            is_alike = is_plain(state)
        else:
            expected = local.shape, local.dtype
            is_alike = _are_sharded_alike(parameter, state)
        values = stored_shard(state)
        if not is_alike or not is_plain(values) or values.device != local.device:
            return False
        if (values.shape, values.dtype) != expected or values.layout is not torch.strided:
            return False
    return True


def _are_sharded_alike(parameter: Any, other: Any) -> bool:
    """Return whether two tensors are plain, or ``DTensor`` with the same placements on the same mesh."""
    if is_plain(parameter) or is_plain(other):
        return is_plain(parameter) and is_plain(other)
    return is_sharded(other) and bool(
        parameter.placements == other.placements and parameter.device_mesh == other.device_mesh
    )


def _local_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the local shards of gradients; None for those that are missing or sharded unlike their parameter."""
    return [
        stored_shard(gradient)
        if gradient is not None and _are_sharded_alike(parameter, gradient) and is_plain(stored_shard(gradient))
        else None
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]


def _are_numbers(*values: Any) -> bool:
    for value in values:  # noqa: SIM110 -- runs in every step, and a generator makes more calls
        if value.__class__ not in _NUMBERS:
            return False
    return True


_NUMBERS: Final = frozenset({float, int})
_ONE: Final = torch.ones((), dtype=torch.float32, device="cpu")
_WITHOUT_STATE: Final[tuple[str, ...]] = ()
_MOMENTUM: Final = ("momentum_buffer",)
_ADAM: Final = ("exp_avg", "exp_avg_sq", "step")
_ADAGRAD: Final = ("sum", "step")


@torch.no_grad()
def _start_late_momentum(optimizer: SGD) -> None:
    """Give parameters that have their first gradient a momentum buffer, if other parameters of their group already have one.

    The fused step of torch fails in this case. The values are such that the buffer is the gradient after the step, as in
    torch's other implementations.
    """
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"]:
            continue
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        late = [each for each in trained if optimizer.state.get(each, {}).get("momentum_buffer") is None]
        if len(late) == len(trained):
            continue
        for parameter in late:
            gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
            buffer = gradient * (group["dampening"] / group["momentum"])
            optimizer.state[parameter]["momentum_buffer"] = buffer if group["dampening"] else torch.zeros_like(gradient)


def _sgd_options(group: Mapping[str, Any]) -> _Options | None:
    fused = bool(group["fused"])
    if not (fused or group["foreach"]) or group["maximize"] or group["differentiable"]:
        return None
    lr, momentum, dampening, decay = group["lr"], group["momentum"], group["dampening"], group["weight_decay"]
    if not _are_numbers(lr, momentum, dampening, decay):
        return None
    return (_MOMENTUM if momentum else _WITHOUT_STATE, lr, momentum, dampening, decay, group["nesterov"], fused)


def _launch_sgd(options: _Options, tensors: Sequence[list[Tensor]], found_inf: Tensor | None) -> None:
    names, lr, momentum, dampening, decay, nesterov, fused = options
    parameters, gradients = tensors[0], tensors[1]
    arguments: dict[str, Any] = {
        "weight_decay": decay,
        "momentum": momentum,
        "lr": lr,
        "dampening": dampening,
        "nesterov": nesterov,
        "maximize": False,
    }
    if fused:
        buffers = tensors[2] if names else []
        fused_sgd(
            parameters, gradients, buffers, is_first_step=False, grad_scale=None, found_inf=found_inf, **arguments
        )
    else:
        optional_buffers: list[Tensor | None] = [*tensors[2]] if names else [None] * len(parameters)
        sgd(parameters, gradients, optional_buffers, foreach=True, fused=False, **arguments)


def _adam_options(group: Mapping[str, Any]) -> _Options | None:
    if not group["fused"] or group["amsgrad"] or group["maximize"] or group["capturable"] or group["differentiable"]:
        return None
    lr, (beta1, beta2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if not _are_numbers(lr, beta1, beta2, eps, decay):
        return None
    return (_ADAM, lr, beta1, beta2, eps, decay, group["decoupled_weight_decay"])


def _launch_adam(options: _Options, tensors: Sequence[list[Tensor]], found_inf: Tensor | None) -> None:
    _, lr, beta1, beta2, eps, decay, decoupled = options
    parameters, gradients, averages, squares, steps = tensors
    (fused_adamw if decoupled else fused_adam)(
        parameters,
        gradients,
        averages,
        squares,
        [],
        steps,
        amsgrad=False,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=decay,
        eps=eps,
        maximize=False,
        grad_scale=None,
        found_inf=found_inf,
    )


def _adagrad_options(group: Mapping[str, Any]) -> _Options | None:
    if not group["fused"] or group["maximize"] or group["differentiable"]:
        return None
    lr, lr_decay, decay, eps = group["lr"], group["lr_decay"], group["weight_decay"], group["eps"]
    return (_ADAGRAD, lr, lr_decay, decay, eps) if _are_numbers(lr, lr_decay, decay, eps) else None


def _launch_adagrad(options: _Options, tensors: Sequence[list[Tensor]], found_inf: Tensor | None) -> None:
    _, lr, lr_decay, decay, eps = options
    parameters, gradients, sums, steps = tensors
    fused_adagrad(
        parameters,
        gradients,
        sums,
        steps,
        lr=lr,
        lr_decay=lr_decay,
        weight_decay=decay,
        eps=eps,
        maximize=False,
        grad_scale=None,
        found_inf=found_inf,
    )


def _count_steps(steps: list[Tensor]) -> None:
    if steps:
        # On the CPU, adding a tensor takes a quarter of the time of adding a number.
        torch._foreach_add_(steps, _ONE if steps[0].is_cpu else 1)


def _revert_steps(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Do not count an update that the kernel skipped."""
    if steps and found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))


@final
@dataclass(frozen=True, slots=True)
class _Kernel:
    """How to update with the kernels of an optimizer class.

    Attributes:
        step: the function ``step`` of the class, which the prepared update replaces.
        implementations: the supported implementations: the options of a parameter group that select them.
        state_names: the names of all state tensors that the kernel may use.
        options: returns the options of a parameter group; None if torch's own step is required.
        launch: updates the parameters, given the options and the lists of parameters, gradients and state tensors.
    """

    step: Callable[..., Any]
    implementations: tuple[str, ...]
    state_names: tuple[str, ...]
    options: Callable[[Mapping[str, Any]], _Options | None]
    launch: Callable[[_Options, Sequence[list[Tensor]], Tensor | None], None]


_FUSED: Final = ("fused",)
_KERNELS: Final[dict[type[Optimizer], _Kernel]] = {
    SGD: _Kernel(step_function(SGD), ("fused", "foreach"), _MOMENTUM, _sgd_options, _launch_sgd),
    Adam: _Kernel(step_function(Adam), _FUSED, _ADAM, _adam_options, _launch_adam),
    AdamW: _Kernel(step_function(AdamW), _FUSED, _ADAM, _adam_options, _launch_adam),
    Adagrad: _Kernel(step_function(Adagrad), _FUSED, _ADAGRAD, _adagrad_options, _launch_adagrad),
}
