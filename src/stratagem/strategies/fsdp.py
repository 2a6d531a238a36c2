"""The strategy for fully sharded data parallelism (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

from stratagem.errors import ConfigTypeError, ConfigValueError, PlacementError
from stratagem.optim.whole_updates import MatrixUpdates
from stratagem.parallel import DDP_OPTIONS, Placement
from stratagem.parallel.deferred_init.materialize import InitSource
from stratagem.parallel.fsdp.options import FSDPOptions, Precision, Reshard, require_equal_randomness
from stratagem.strategies.composed import ComposedStrategy
from stratagem.strategies.fsdp_names import from_model_wrapper, state_of
from stratagem.utils import did_you_mean, import_object
from stratagem.utils.signatures import arguments_of

__all__ = ["FSDPStrategy"]

_DDP_ONLY = frozenset({*DDP_OPTIONS, "ddp_kwargs"} - {"mixed_precision"})
_STATES = ("sharded", "full")


@final
class FSDPStrategy(ComposedStrategy):
    """Trains with PyTorch's ``fully_shard``: parameters, gradients and the optimizer state are sharded across ranks.

    The parameters of a wrapped module are gathered only while the module is in use.

    Args:
        wrap_policy: the modules to wrap, each of which is gathered separately. By default the items of every
            ``ModuleList``; or a class, the name of a class, or a list of them; ``dict(classes=...)``,
            ``dict(modules=["layers.*"])`` or ``dict(min_params=1_000_000)``; or a function ``(name, module) -> bool``.
        reshard_after_forward: whether gathered parameters are freed after the forward pass. True saves memory; False
            saves an all-gather in the backward pass; a number reshards them to groups of that many ranks; None means True
            for wrapped modules except the last one, with which the backward pass begins, and False for all other parameters.
            A mapping from module name patterns to such values sets each wrapped module separately.
        mixed_precision: a dtype to compute in, such as ``"bfloat16"``, or a mapping with ``param_dtype``,
            ``reduce_dtype``, ``output_dtype``, ``buffer_dtype`` and ``cast_forward_inputs``.
        replicate: the number of replicas of the sharded model (HSDP).
        tp: the number of ranks that layers are sharded across (tensor parallelism). These ranks process the same samples.
        tp_plan: maps patterns of module names to ``"colwise"``, ``"rowwise"`` etc., see
            :data:`~stratagem.parallel.fsdp.tensor_parallel.STYLES`; by default the model's attribute ``tp_plan``.
        cpu_offload: whether shards, gradients and the optimizer state are stored in CPU memory.
        forward_prefetch: the number of wrapped modules to prefetch in the forward pass; 0 for torch's default.
        backward_prefetch: the same for the backward pass.
        ignored: name patterns of modules or parameters that are not sharded; their gradients are averaged.
        activation_checkpointing: True for the wrapped modules, a policy like ``wrap_policy``, or a mapping with
            ``policy``, ``save_ops`` and ``preserve_rng_state``.
        compile_blocks: True, or arguments of ``torch.compile``, to compile each wrapped module separately.
        initial_weights: the ranks that compute the initial weights; the values always equal those of a single-process run.
            ``"rank0"``: rank 0 broadcasts them in chunks. ``"per_rank"``: every rank computes all of them and keeps its
            shard. ``"whole"``: every process first builds the whole model.
        skip_init_weights: whether to leave the weights uninitialized, because a checkpoint will be loaded.
        forward_methods: methods other than ``forward`` that use parameters, such as ``"decoder.generate"``.
        matrix_updates: how ``torch.optim.Muon`` orthogonalizes sharded matrices, with the same results. ``"owned"``: each
            matrix on one rank, with the work divided evenly. ``"gathered"``: all matrices on every rank.
        sync_bn: ``"torch"`` converts BatchNorm layers to SyncBatchNorm.
        state: ``"sharded"``: all ranks write checkpoints; ``"full"``: rank 0 gathers and writes them.
        model_wrapper: options with the names used by MMEngine's ``MMFullyShardedDataParallel``.
        state_dict_cfg: MMEngine's name for ``state``.
        kwargs: the arguments of :class:`BaseStrategy`.

    Raises:
        LaunchError: if no launcher started this process.
        PlacementError: if ``replicate`` and ``tp`` do not divide the number of processes, or an option of ``DDPStrategy``
            is given.
        ConfigError: (or a subclass) if an option is invalid.
    """

    def __init__(
        self,
        *,
        wrap_policy: Any = None,
        reshard_after_forward: Reshard | Mapping[str, Reshard] = None,
        mixed_precision: Mapping[str, Any] | str | None = None,
        replicate: int = 1,
        tp: int = 1,
        tp_plan: Mapping[str, Any] | None = None,
        cpu_offload: bool = False,
        forward_prefetch: int = 0,
        backward_prefetch: int = 0,
        ignored: Sequence[str] = (),
        activation_checkpointing: Any = None,
        compile_blocks: bool | Mapping[str, Any] = False,
        initial_weights: InitSource = "rank0",
        skip_init_weights: bool = False,
        forward_methods: Sequence[str] = (),
        sync_bn: str | None = None,
        matrix_updates: MatrixUpdates = "owned",
        state: Literal["sharded", "full"] | None = None,
        model_wrapper: Mapping[str, Any] | None = None,
        state_dict_cfg: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        own = {
            "wrap_policy": wrap_policy,
            "reshard_after_forward": reshard_after_forward,
            "mixed_precision": mixed_precision,
            "replicate": replicate,
            "tp": tp,
            "tp_plan": tp_plan,
            "cpu_offload": cpu_offload,
            "forward_prefetch": forward_prefetch,
            "backward_prefetch": backward_prefetch,
            "ignored": ignored,
            "activation_checkpointing": activation_checkpointing,
            "compile_blocks": compile_blocks,
            "initial_weights": initial_weights,
            "skip_init_weights": skip_init_weights,
            "forward_methods": forward_methods,
            "sync_bn": sync_bn,
            "matrix_updates": matrix_updates,
            "state": state,
            "model_wrapper": model_wrapper,
            "state_dict_cfg": state_dict_cfg,
        }
        self._options, self._state = _parse({**own, **kwargs})
        super().__init__(**kwargs)

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        options, _ = _parse(arguments)
        randomness = (arguments.get("env_kwargs") or {}).get("randomness") or {}
        require_equal_randomness(options.tp, diff_rank_seed=bool(randomness.get("diff_rank_seed", False)))
        super().check_arguments(arguments)

    def _make_placement(self) -> Placement:
        self._require_processes()
        # Imported here because importing torch's FSDP takes a second.
        placement_class = import_object("stratagem.parallel.fsdp.placement:FSDPPlacement")
        placement: Placement = placement_class(
            self.logger,
            self._options,
            self.world,
            diff_rank_rng=bool(self.randomness.get("diff_rank_seed", False)),
            full_state=self._state == "full",
        )
        return placement


_NAMED = tuple(name for name in FSDPOptions.__dataclass_fields__ if name != "precision")
# MMEngine's model_wrapper can set these options under other names.
_TRANSLATED: Mapping[str, Any] = {
    "wrap_policy": None,
    "reshard_after_forward": None,
    "cpu_offload": False,
    "ignored": (),
}


def _parse(arguments: Mapping[str, Any]) -> tuple[FSDPOptions, str]:
    """Return the sharding configuration and the checkpoint format; arguments of the base class are not used.

    Raises:
        PlacementError: if an argument is an option of ``DDPStrategy``.
        ConfigTypeError: if no class has an argument.
    """
    known = {*(FSDPStrategy.__init__.__kwdefaults__ or ()), *arguments_of(ComposedStrategy).names}
    for name in arguments:
        if name in _DDP_ONLY:
            raise PlacementError(
                f"{name} is an option of DDPStrategy that FSDPStrategy does not have, since it shards the model. Omit it."
            )
        if name not in known:
            raise ConfigTypeError(f"FSDPStrategy takes no argument {name!r}. {did_you_mean(name, known)}")
    options = {**_TRANSLATED, "mixed_precision": None}
    options = {name: arguments.get(name, default) for name, default in options.items()}
    if arguments.get("model_wrapper") is not None:
        options = from_model_wrapper(arguments["model_wrapper"], options)
    precision = Precision.parse(options.pop("mixed_precision"))
    named = {name: arguments[name] for name in _NAMED if name in arguments}
    parsed = FSDPOptions(**{**named, **options, "precision": precision})
    state = arguments.get("state")
    kind = state_of(state, arguments.get("state_dict_cfg"))
    if kind not in _STATES:
        raise ConfigValueError(f"Unknown state={state!r}. {did_you_mean(str(state), _STATES)}")
    return parsed, kind
