"""The models, strategies and numbers of ranks that are planned and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import tests.foreign.torchvision_ops  # noqa: F401 -- before timm and transformers, which import torchvision
from stratagem import ModelWithLoss, SupervisedModel
from stratagem.config import Config

__all__ = ["CASES", "ENVIRONMENTS", "EXAMPLES", "MODELS", "Case", "case_named", "config_of", "model_names_of"]

_EXAMPLES: Final = Path(__file__).parents[3] / "examples"
_BATCH: Final = 4
EXAMPLES: Final = ("GPT example", "MNIST example")
MODELS: Final = (*EXAMPLES, "transformers Llama", "timm ViT")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A strategy with changes of the configuration.

    Attributes:
        name: a short name.
        strategy: the configuration of the strategy.
        worlds: the numbers of ranks.
        changes: changes of the configuration by dotted path.
        muon: whether Muon updates the hidden matrices.
        accumulation: the number of micro-batches of a step.
    """

    name: str
    strategy: Mapping[str, Any]
    worlds: tuple[int, ...] = (1, 2, 4)
    changes: Mapping[str, Any] = field(default_factory=dict)
    muon: bool = False
    accumulation: int = 1

    @property
    def environment(self) -> str:
        """The environment that has the engine: a key of ``ENVIRONMENTS``."""
        return {"DeepSpeedStrategy": "deepspeed", "ColossalAIStrategy": "colossalai"}.get(
            self.strategy["type"], "torch"
        )


def _fsdp(**options: Any) -> Mapping[str, Any]:
    return MappingProxyType({"type": "FSDPStrategy", **options})


def _zero(stage: int, *, zero: Mapping[str, Any] = MappingProxyType({}), **options: Any) -> Mapping[str, Any]:
    """Return DeepSpeedStrategy with buckets that are smaller than the models."""
    section = {"stage": stage, "reduce_bucket_size": 40_000}
    if stage == 3:
        section |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 40_000}
    return MappingProxyType({"type": "DeepSpeedStrategy", "zero_optimization": {**section, **zero}, **options})


def _plugin(name: str, precision: str = "fp32", **options: Any) -> Mapping[str, Any]:
    return MappingProxyType(
        {"type": "ColossalAIStrategy", "plugin": {"type": name, **options}, "mixed_precision": precision}
    )


# The installed environments that train: with torch alone, and with an engine.
ENVIRONMENTS: Final = MappingProxyType({"torch": "torch", "deepspeed": "DeepSpeed", "colossalai": "ColossalAI"})
_SINGLE: Final = MappingProxyType({"type": "SingleDeviceStrategy"})
_DDP: Final = MappingProxyType({"type": "DDPStrategy"})
_SMALL_BUCKETS: Final = MappingProxyType({"reduce_bucket_size_in_m": 0.04})
_EMA: Final = MappingProxyType({"custom_hooks": [{"type": "EMAHook"}]})
CASES: Final = (
    Case(name="single", strategy=_SINGLE, worlds=(1,)),
    Case(name="single, EMA", strategy=_SINGLE, worlds=(1,), changes=_EMA),
    Case(name="single, Muon and AdamW", strategy=_SINGLE, worlds=(1,), muon=True),
    Case(name="DDP", strategy=_DDP),
    Case(name="DDP, gradient_as_bucket_view", strategy={**_DDP, "gradient_as_bucket_view": True}, worlds=(2, 4)),
    Case(name="DDP, 3 micro-batches", strategy=_DDP, worlds=(2,), accumulation=3),
    Case(name="DDP, EMA", strategy=_DDP, worlds=(2,), changes=_EMA),
    Case(name="DDP, Muon and AdamW", strategy=_DDP, worlds=(2,), muon=True),
    Case(name="FSDP", strategy=_fsdp()),
    Case(name="FSDP, no resharding", strategy=_fsdp(reshard_after_forward=False), worlds=(2, 4)),
    Case(name="FSDP, bfloat16", strategy=_fsdp(mixed_precision="bfloat16"), worlds=(2, 4)),
    Case(name="FSDP, activation checkpointing", strategy=_fsdp(activation_checkpointing=True), worlds=(2, 4)),
    Case(name="FSDP, CPU offload", strategy=_fsdp(cpu_offload=True), worlds=(2, 4)),
    Case(name="FSDP, 5 micro-batches", strategy=_fsdp(), worlds=(2,), accumulation=5),
    Case(name="FSDP, EMA", strategy=_fsdp(), worlds=(2, 4), changes=_EMA),
    Case(name="FSDP, Muon and AdamW", strategy=_fsdp(), worlds=(2, 4), muon=True),
    Case(name="HSDP, 2 replicas", strategy=_fsdp(replicate=2), worlds=(4,)),
    Case(name="TP x2", strategy=_fsdp(tp=2), worlds=(2, 4)),
    *(Case(name=f"ZeRO {stage}", strategy=_zero(stage)) for stage in range(4)),
    *(Case(name=f"ZeRO {stage}, bfloat16", strategy=_zero(stage, bf16=True)) for stage in range(4)),
    Case(name="ZeRO 2, float16", strategy=_zero(2, fp16={"enabled": True, "initial_scale_power": 0})),
    Case(name="ZeRO 2, 3 micro-batches", strategy=_zero(2), accumulation=3),
    Case(name="ZeRO 3, 3 micro-batches", strategy=_zero(3), accumulation=3),
    *(
        Case(name=f"ZeRO 3, 3 micro-batches, {name}", strategy=_zero(3, zero=limits), accumulation=3)
        for name, limits in {
            "1 live parameter": {"stage3_max_live_parameters": 1},
            "reuse distance 0": {"stage3_max_reuse_distance": 0},
            "limits of 20,000": {"stage3_max_live_parameters": 20_000, "stage3_max_reuse_distance": 20_000},
            "nothing persistent": {
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 1,
                "stage3_max_reuse_distance": 0,
            },
        }.items()
    ),
    Case(name="ZeRO 1, EMA", strategy=_zero(1), changes=_EMA),
    Case(
        name="ZeRO 2, offloaded optimizer",
        strategy=_zero(2, zero={"offload_optimizer": {"device": "cpu"}}, bf16=True),
    ),
    Case(name="torch-ddp", strategy=_plugin("torch-ddp")),
    Case(name="torch-ddp, EMA", strategy=_plugin("torch-ddp"), changes=_EMA),
    *(
        Case(name=f"lowlevel-zero {stage}", strategy=_plugin("lowlevel-zero", stage=stage, **_SMALL_BUCKETS))
        for stage in (1, 2)
    ),
    *(
        Case(
            name=f"lowlevel-zero {stage}, bfloat16",
            strategy=_plugin("lowlevel-zero", "bf16", stage=stage, **_SMALL_BUCKETS),
        )
        for stage in (1, 2)
    ),
    Case(
        name="lowlevel-zero 2, 3 micro-batches",
        strategy=_plugin("lowlevel-zero", stage=2, **_SMALL_BUCKETS),
        accumulation=3,
    ),
    Case(name="hybrid-parallel, tp_size=2", strategy=_plugin("hybrid-parallel", "bf16", tp_size=2), worlds=(2, 4)),
)


def case_named(name: str) -> Case:
    """Return the case with a name."""
    return next(each for each in CASES if each.name == name)


@final
class Tokens(Dataset[Any]):
    """64 sequences of 32 random tokens."""

    def __init__(self) -> None:
        self.tokens = torch.randint(128, (64, 32), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


@final
class Characters(Dataset[Any]):
    """64 sequences of 33 random characters."""

    def __init__(self) -> None:
        self.tokens = torch.randint(67, (64, 33), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]


@final
class Digits(Dataset[Any]):
    """64 random gray images with a class."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 28, 28), index / 64), index % 10


@final
class Pictures(Dataset[Any]):
    """64 random images with a class."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 32, 32), index / 64), index % 10


def llama() -> nn.Module:
    """Return a small Llama of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 176, "vocab_size": 128, "use_cache": False,
    }  # fmt: skip
    model = ModelWithLoss(LlamaForCausalLM(LlamaConfig(**sizes)))
    model.tp_plan = _TP_PLANS["transformers Llama"]
    return model


def vit() -> nn.Module:
    """Return a small vision transformer of timm."""
    import timm

    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=64, num_heads=4, num_classes=10
    )
    model = SupervisedModel(network, nn.CrossEntropyLoss())
    model.tp_plan = _TP_PLANS["timm ViT"]
    return model


_TP_PLANS: Final = MappingProxyType(
    {
        "transformers Llama": {
            f"network.model.layers.*.mlp.{name}": style
            for name, style in (("gate_proj", "colwise"), ("up_proj", "colwise"), ("down_proj", "rowwise"))
        },
        "timm ViT": {"network.blocks.*.mlp.fc1": "colwise", "network.blocks.*.mlp.fc2": "rowwise"},
    }
)
_WRAPPED: Final = MappingProxyType({"transformers Llama": "LlamaDecoderLayer", "timm ViT": "Block"})


def model_names_of(case: Case) -> tuple[str, ...]:
    """Return the models with which a case is run.

    The CNN has no layers for tensor parallelism, activation checkpointing and Muon, and rotates images only in float32.
    """
    options = case.strategy.keys() & {"tp", "activation_checkpointing", "mixed_precision", "bf16", "fp16"}
    options -= {"mixed_precision"} if case.strategy.get("mixed_precision") == "fp32" else set()
    return tuple(name for name in MODELS if name != "MNIST example" or not (options or case.muon))


def config_of(model: str, case: Case) -> Config:
    """Return the configuration of a model with a case."""
    config = _example(model) if model in EXAMPLES else _foreign(model)
    strategy = dict(case.strategy)
    if strategy["type"] == "FSDPStrategy" and model in _WRAPPED:
        strategy["wrap_policy"] = _WRAPPED[model]
    config["strategy"] = strategy
    if case.muon:
        config["optim_wrapper"]["optimizer"] = {
            "type": "MixedOptimizer",
            "parts": {"muon": {"type": "Muon", "lr": 0.02}, "adamw": {"type": "AdamW", "lr": 1e-3}},
            "hidden_matrices": "muon",
            "others": "adamw",
        }
        config["optim_wrapper"].pop("paramwise_cfg", None)
    config["optim_wrapper"]["accumulative_counts"] = case.accumulation
    config.merge_from_dict(dict(case.changes))
    return config


def _example(model: str) -> Config:
    config = Config.fromfile(_EXAMPLES / ("gpt" if model == "GPT example" else "mnist") / "config.py")
    config["train_dataloader"]["batch_size"] = _BATCH
    if model == "GPT example":
        config["model"].update(width=64, blocks=3, length=32)
        # Reading the text takes longer than training.
        config["train_dataloader"]["dataset"] = {"type": f"{__name__}.Characters"}
    else:
        config["train_dataloader"]["dataset"] = {"type": f"{__name__}.Digits"}
    return config


def _foreign(model: str) -> Config:
    here = __name__
    function, dataset = ("llama", "Tokens") if model == "transformers Llama" else ("vit", "Pictures")
    return Config(
        {
            "model": {"type": f"{here}.{function}"},
            "train_dataloader": {"batch_size": _BATCH, "dataset": {"type": f"{here}.{dataset}"}},
            "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 1e-3}, "clip_grad": {"max_norm": 1.0}},
            "train_cfg": {"max_iters": 100},
        }
    )
