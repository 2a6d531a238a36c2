"""The model's parameters in shards, one on each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

from stratagem.errors import ConfigValueError, PlacementError
from stratagem.parallel import DDP_OPTIONS, Placement
from stratagem.parallel.deferred_init.materialize import InitSource
from stratagem.parallel.fsdp.options import FSDPOptions, Precision, Reshard
from stratagem.strategies.composed import ComposedStrategy
from stratagem.strategies.fsdp_names import from_model_wrapper, state_of
from stratagem.utils import did_you_mean, import_object

__all__ = ["FSDPStrategy"]

_DDP_ONLY = (*DDP_OPTIONS, "ddp_kwargs")
_STATES = ("sharded", "full")


@final
class FSDPStrategy(ComposedStrategy):
    """PyTorch's ``fully_shard``: parameters, gradients and the optimizer's state in shards.

    Parameters are gathered block by block while they are used.

    Args:
        wrap_policy: which modules are gathered by themselves. By default the items of every ``ModuleList``; else the name
            of a class, a class, or a list of them; ``dict(classes=...)``, ``dict(modules=["layers.*"])``,
            ``dict(min_params=1_000_000)``; or a function ``(name, module) -> bool``.
        reshard_after_forward: whether gathered parameters are freed after the forward pass: True saves memory, False
            saves a gathering in the backward pass, a number keeps them shared by groups of so many ranks; None is True
            for the wrapped modules and False for the rest. Or a mapping from patterns of names to these.
        mixed_precision: a type to compute in, such as ``"bfloat16"``, or a mapping with ``param_dtype``,
            ``reduce_dtype``, ``output_dtype``, ``buffer_dtype`` and ``cast_forward_inputs``.
        replicate: how many replicas of the sharded model there are (HSDP): shards lie within each.
        tp: over how many ranks a layer's own arithmetic is spread (tensor parallel); they see the same samples.
        tp_plan: pattern of module names -> ``"colwise"``, ``"rowwise"`` ..., see
            :data:`~stratagem.parallel.fsdp.tensor_parallel.STYLES`; by default the model's attribute ``tp_plan``.
        cpu_offload: whether shards, gradients and the optimizer's state lie in the CPU's memory.
        forward_prefetch: how many wrapped modules ahead parameters are gathered in the forward pass; 0 leaves it to torch.
        backward_prefetch: the same for the backward pass.
        ignored: patterns of modules or parameters that stay whole on every rank; their gradients are averaged.
        activation_checkpointing: True for the wrapped modules, a policy like ``wrap_policy``, or a mapping with
            ``policy``, ``save_ops`` and ``preserve_rng_state``.
        compile_blocks: True, or arguments of ``torch.compile``, to compile each wrapped module by itself.
        initial_weights: who makes them, all the same values as one process: ``"rank0"`` sends them piece by piece,
            ``"per_rank"`` has every rank draw them all and keep its part, ``"whole"`` builds the whole model in each
            process first.
        skip_init_weights: whether nothing is drawn, because a checkpoint follows.
        forward_methods: other methods than ``forward`` that use parameters, such as ``"decoder.generate"``.
        sync_bn: ``"torch"`` turns BatchNorm layers into SyncBatchNorm.
        state: ``"sharded"``: checkpoints are written by all ranks; ``"full"``: rank 0 gathers and writes them.
        model_wrapper: options under the names of MMEngine's ``MMFullyShardedDataParallel``.
        state_dict_cfg: MMEngine's name for ``state``.
        kwargs: those of :class:`BaseStrategy`.

    Raises:
        LaunchError: if no launcher started this process.
        PlacementError: if ``replicate`` and ``tp`` do not divide the processes, or an option is DDP's.
        ConfigError: in one of its kinds, if an option is wrong.
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
        state: Literal["sharded", "full"] | None = None,
        model_wrapper: Mapping[str, Any] | None = None,
        state_dict_cfg: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if name in _DDP_ONLY:
                raise PlacementError(
                    f"{name} is an option of DDPStrategy, and means nothing to FSDPStrategy: it keeps no replicas. Leave it "
                    "out."
                )
        options: dict[str, Any] = {
            "wrap_policy": wrap_policy,
            "reshard_after_forward": reshard_after_forward,
            "mixed_precision": mixed_precision,
            "cpu_offload": cpu_offload,
            "ignored": ignored,
        }
        if model_wrapper is not None:
            options = from_model_wrapper(model_wrapper, options)
        self._options = FSDPOptions(
            precision=Precision.parse(options.pop("mixed_precision")),
            replicate=replicate,
            tp=tp,
            tp_plan=tp_plan,
            forward_prefetch=forward_prefetch,
            backward_prefetch=backward_prefetch,
            activation_checkpointing=activation_checkpointing,
            compile_blocks=compile_blocks,
            initial_weights=initial_weights,
            skip_init_weights=skip_init_weights,
            forward_methods=forward_methods,
            sync_bn=sync_bn,
            **options,
        )
        self._state = state_of(state, state_dict_cfg)
        if self._state not in _STATES:
            raise ConfigValueError(f"state={state!r} is not known. {did_you_mean(str(state), _STATES)}")
        super().__init__(**kwargs)

    def _make_placement(self) -> Placement:
        self._require_processes()
        # By name: torch's options takes a second to import, which other runs need not wait for.
        sharded = import_object("stratagem.parallel.fsdp.placement:FSDPPlacement")
        placement: Placement = sharded(
            self.logger,
            self._options,
            self.world,
            diff_rank_rng=bool(self.randomness.get("diff_rank_seed", False)),
            full_state=self._state == "full",
        )
        return placement
