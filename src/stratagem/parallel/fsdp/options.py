"""FSDP options, which are validated before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self, final

import torch
from torch import nn

from stratagem.errors import ConfigTypeError, ConfigValueError, PlacementError
from stratagem.model.norms import require_sync_bn
from stratagem.optim.amp import HALF_DTYPES
from stratagem.optim.whole_updates import MATRIX_UPDATES, MatrixUpdates
from stratagem.parallel.activation_checkpointing import parse_checkpointing
from stratagem.parallel.deferred_init.materialize import INIT_SOURCES, InitSource
from stratagem.parallel.wrap_policy import check_policy, matches_name
from stratagem.utils import import_object
from stratagem.utils.data_rules import refuse_data_arguments
from stratagem.utils.names import did_you_mean, refuse_unknown

__all__ = ["FSDPOptions", "Precision", "Reshard", "require_equal_randomness", "require_rank_counts"]

_DTYPES: Final = {"float32": torch.float32, "fp32": torch.float32, **HALF_DTYPES}

Reshard = bool | int | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The dtypes in which a sharded model computes. Sharded parameters and the optimizer state keep their dtype.

    Attributes:
        param_dtype: the dtype of gathered parameters and of the computation; None for the dtype of the parameters.
        reduce_dtype: the dtype in which gradients are reduced across ranks; None for the dtype of the computation.
        output_dtype: the dtype to which the outputs of a wrapped module are cast; None to keep their dtype.
        buffer_dtype: the dtype to which floating-point buffers are cast once; None to keep their dtype.
        cast_forward_inputs: whether the inputs of a wrapped module are cast to ``param_dtype``.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    buffer_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True

    @classmethod
    def parse(cls, options: Mapping[str, Any] | str | torch.dtype | None) -> Self:
        """Parse ``mixed_precision``: a mapping of the attributes, or the dtype to compute in.

        Raises:
            ConfigKeyError: if a key is unknown.
            ConfigTypeError: if it is neither a mapping nor a dtype.
            ConfigValueError: if a dtype is unknown.
        """
        if options is None:
            return cls()
        if isinstance(options, str | torch.dtype):
            # With the 8 significant bits of bfloat16, the sum of the gradients of many ranks is too inaccurate.
            return cls(param_dtype=_dtype("param_dtype", options), reduce_dtype=torch.float32)
        if not isinstance(options, Mapping):
            raise ConfigTypeError(f"mixed_precision must be a dtype such as 'bfloat16', or a mapping, got {options!r}.")
        refuse_unknown(options, cls.__dataclass_fields__, "mixed_precision")
        types = {key: _dtype(key, value) for key, value in options.items() if key != "cast_forward_inputs"}
        return cls(**types, cast_forward_inputs=bool(options.get("cast_forward_inputs", True)))


def _dtype(key: str, value: Any) -> torch.dtype | None:
    if value is None or (isinstance(value, torch.dtype) and value.is_floating_point):
        return value
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigValueError(f"mixed_precision: unknown {key}={value!r}. {did_you_mean(name, _DTYPES)}")
    return _DTYPES[name]


def require_rank_counts(**counts: int) -> None:
    """Check the options ``replicate`` and ``tp``.

    Raises:
        ConfigTypeError: if one of them is not a positive integer.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigTypeError(f"{name} must be the number of ranks, an integer >= 1, got {value!r}.")


def require_equal_randomness(tp: int, *, diff_rank_seed: bool) -> None:
    """Require that the ranks of a tensor-parallel group draw the same random numbers.

    Raises:
        PlacementError: if they do not.
    """
    if diff_rank_seed and tp > 1:
        raise PlacementError(
            "randomness: with diff_rank_seed=True, the ranks of a tensor-parallel group would apply different "
            "dropout masks to the same samples. Omit diff_rank_seed."
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FSDPOptions:
    """The sharding configuration of a model; see :class:`~stratagem.strategies.FSDPStrategy` for the options."""

    wrap_policy: Any = None
    reshard_after_forward: Reshard | Mapping[str, Reshard] = None
    precision: Precision = field(default_factory=Precision)
    replicate: int = 1
    tp: int = 1
    tp_plan: Mapping[str, Any] | None = None
    cpu_offload: bool = False
    forward_prefetch: int = 0
    backward_prefetch: int = 0
    ignored: Sequence[str] = ()
    activation_checkpointing: Any = None
    compile_blocks: bool | Mapping[str, Any] = False
    initial_weights: InitSource = "rank0"
    skip_init_weights: bool = False
    forward_methods: Sequence[str] = ()
    sync_bn: str | None = None
    matrix_updates: MatrixUpdates = "owned"

    def __post_init__(self) -> None:
        require_rank_counts(replicate=self.replicate, tp=self.tp)
        check_policy(self.wrap_policy, "wrap_policy")
        parse_checkpointing(self.activation_checkpointing)
        if self.sync_bn is not None:
            require_sync_bn(self.sync_bn)
        for name in ("forward_prefetch", "backward_prefetch"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ConfigTypeError(
                    f"{name} must be the number of blocks to prefetch, or 0 for torch's default, got {count!r}."
                )
        for name in ("cpu_offload", "skip_init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigTypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if isinstance(self.compile_blocks, Mapping):
            refuse_data_arguments(torch.compile, self.compile_blocks, "compile_blocks: ")
        for name in ("ignored", "forward_methods"):
            names = getattr(self, name)
            if isinstance(names, str) or not all(isinstance(each, str) for each in names):
                raise ConfigTypeError(f"{name} must be a list of names, got {names!r}.")
        if self.initial_weights not in INIT_SOURCES:
            raise ConfigValueError(
                f"Unknown initial_weights={self.initial_weights!r}. {did_you_mean(str(self.initial_weights), INIT_SOURCES)}"
            )
        if self.matrix_updates not in MATRIX_UPDATES:
            raise ConfigValueError(
                f"Unknown matrix_updates={self.matrix_updates!r}. {did_you_mean(str(self.matrix_updates), MATRIX_UPDATES)}"
            )
        if self.tp_plan is not None and self.tp == 1:
            raise ConfigValueError("tp_plan is set, but tp=1 disables tensor parallelism. Set tp.")
        if self.tp_plan is not None:
            import_object("stratagem.parallel.fsdp.tensor_parallel:parse_plan")(self.tp_plan)
        if not isinstance(self.compile_blocks, bool | Mapping | None):
            raise ConfigTypeError(
                f"compile_blocks must be True, False or a mapping of arguments for torch.compile, got {self.compile_blocks!r}."
            )
        for value in self._reshard_values():
            if value is not None and not isinstance(value, bool | int):
                raise ConfigTypeError(
                    "reshard_after_forward must be True, False, a number of ranks, or a mapping from module name patterns to "
                    f"such values, got {value!r}."
                )

    def _reshard_values(self) -> list[Any]:
        reshard = self.reshard_after_forward
        return list(reshard.values()) if isinstance(reshard, Mapping) else [reshard]

    def reshard_of(self, name: str) -> Reshard:
        """Return ``reshard_after_forward`` for the wrapped module of this name."""
        reshard = self.reshard_after_forward
        if not isinstance(reshard, Mapping):
            return reshard
        return next((value for pattern, value in reshard.items() if matches_name(name, pattern)), None)

    def require_reshard_patterns(self, blocks: Sequence[str]) -> None:
        """Require that every pattern of ``reshard_after_forward`` matches a wrapped module.

        Raises:
            ConfigValueError: if a pattern matches no wrapped module.
        """
        reshard = self.reshard_after_forward
        for pattern in reshard if isinstance(reshard, Mapping) else ():
            if not any(matches_name(name, pattern) for name in ("", *blocks)):
                raise ConfigValueError(
                    f"reshard_after_forward: no wrapped module matches {pattern!r}. {did_you_mean(pattern, blocks)}"
                )

    def ignored_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that are not sharded: scalars, empty parameters, and parameters that match ``ignored``.

        Raises:
            ConfigValueError: if a pattern matches neither a module nor a parameter.
        """
        named = dict(model.named_parameters())
        modules = dict(model.named_modules())
        found = {name: parameter for name, parameter in named.items() if parameter.ndim == 0 or not parameter.numel()}
        for pattern in self.ignored:
            fits: Callable[[str], bool] = lambda name, pattern=pattern: matches_name(name, pattern)  # type: ignore[misc]  # noqa: E731
            inside = [module for name, module in modules.items() if name and fits(name)]
            direct = {name: parameter for name, parameter in named.items() if fits(name)}
            if not inside and not direct:
                raise ConfigValueError(
                    f"ignored: no module or parameter matches {pattern!r}. {did_you_mean(pattern, [*named, *modules])}"
                )
            within = {id(parameter) for module in inside for parameter in module.parameters()}
            found |= direct | {name: each for name, each in named.items() if id(each) in within}
        return found
