"""The arguments that data files may set for targets that load models, compile or start programs.

Each rule lists the allowed arguments. Every other argument of such a target is rejected if it comes from a data file, so
arguments that a later version of a library adds are rejected until they are listed here. Targets without a rule accept any
argument: arguments are plain data, and none of the built-in entries executes data as code.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, final

from stratagem.errors import ConfigValueError
from stratagem.utils.data_names import DataName, data_keys, holds_data
from stratagem.utils.imports import import_module, import_object
from stratagem.utils.names import did_you_mean

__all__ = ["is_restricted", "refuse_data_arguments", "refused_arguments", "rules_of", "weights_only_loads"]

# Keys that are part of the mapping but are not passed to the target.
_RESERVED_KEYS: Final = frozenset({"type", "_scope_"})


@final
@dataclass(frozen=True, slots=True)
class AllowedValues:
    """The values that an argument may have. ``described`` completes the sentence "It may be ..." in errors."""

    described: str
    accept: Callable[[Any], bool]


@final
@dataclass(frozen=True, slots=True)
class DataRules:
    """The arguments that a data file may set for one kind of target.

    Args:
        applies: A function that returns whether a class or function is of this kind, without importing anything.
        allowed: The allowed arguments, each with its allowed values.
        fixed: Arguments to pass if the program does not set them.
        others: The allowed values of all other arguments; None to reject other arguments.
    """

    applies: Callable[[Any], bool]
    allowed: Mapping[str, AllowedValues] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    others: AllowedValues | None = None


def rules_of(target: Any) -> DataRules | None:
    """Return the rules for a class or function; None if a data file may set any of its arguments."""
    return next((rules for rules in _RULES if rules.applies(target)), None)


def refused_arguments(target: Any, given: Mapping[str, Any]) -> dict[str, str]:
    """Return the arguments in ``given`` that a data file must not set for ``target``, each with the reason.

    If a data file chose the target (the ``type``), every argument is checked against the rules, since the origin of the
    values is lost if a program has rebuilt the mapping. Otherwise only arguments from data files are checked.
    """
    rules = rules_of(target)
    if rules is None:
        return {}
    suspects = given.keys() if isinstance(given.get("type"), DataName) else _names_from_data(given)
    refused = {name: _rejection_reason(name, given[name], rules, target) for name in given if name in suspects}
    return {name: reason for name, reason in refused.items() if reason and name not in _RESERVED_KEYS}


def refuse_data_arguments(target: Any, given: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Raise an error for arguments that a data file must not set; return additional arguments to call the target with.

    Raises:
        ConfigValueError: if there is such an argument.
    """
    refused = refused_arguments(target, given)
    if refused:
        raise ConfigValueError("\n".join(f"{where}{reason}" for reason in refused.values()))
    rules = rules_of(target)
    if rules is None or not is_restricted(target, given):
        return {}
    return {name: value for name, value in rules.fixed.items() if name not in given}


def is_restricted(target: Any, given: Mapping[str, Any]) -> bool:
    """Return whether ``target`` has rules and a data file chose it or set one of its arguments."""
    return rules_of(target) is not None and (isinstance(given.get("type"), DataName) or bool(_names_from_data(given)))


@contextmanager
def weights_only_loads() -> Iterator[None]:
    """Force ``torch.load`` to use ``weights_only=True`` in this process, regardless of its argument."""
    force, allow = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, allow)}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _names_from_data(given: Mapping[str, Any]) -> set[str]:
    return data_keys(given) | {
        name for name, value in given.items() if name not in _RESERVED_KEYS and holds_data(value)
    }


def _rejection_reason(name: str, value: Any, rules: DataRules, target: Any) -> str | None:
    allowed = rules.allowed.get(name, rules.others)
    title = _title(target)
    if allowed is None:
        known = (
            f"Allowed: {', '.join(sorted(rules.allowed))}."
            if rules.allowed
            else "No argument of this target is allowed in a data file."
        )
        return f"a data file cannot set {name!r} of {title}. {known} Write this part of the configuration in Python."
    if not allowed.accept(value):
        near = f" {did_you_mean(value, _BACKENDS)}" if name == "backend" and isinstance(value, str) else ""
        return (
            f"a data file cannot set {name}={value!r} of {title}. It may be {allowed.described}.{near} Write this part of "
            "the configuration in Python to use another value."
        )
    return None


def _title(target: Any) -> str:
    function = target.func if isinstance(target, partial) else target
    module = getattr(function, "__module__", None) or ""
    owner = getattr(function, "__self__", None)
    name = f"{owner.__name__}.{function.__name__}" if isinstance(owner, type) else getattr(function, "__name__", "")
    return f"{module.partition('.')[0]}.{name}" if module else name


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float)


def _is_numbers(value: Any) -> bool:
    return all(map(_is_numbers, value)) if isinstance(value, list | tuple) else _is_number(value)


def _is_labels(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(each, str | int) for pair in value.items() for each in pair)


def _one_of(*values: object) -> AllowedValues:
    named = ", ".join(map(repr, values))
    return AllowedValues(f"one of {named}" if len(values) > 1 else named, lambda value: _is_listed(value, values))


def _is_listed(value: Any, values: tuple[object, ...]) -> bool:
    # Compare types as well: 1 equals True, but libraries distinguish them.
    return any(value == each and isinstance(value, type(each)) for each in values)


def _is_plain_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


_FLAG: Final = AllowedValues("True or False", lambda value: isinstance(value, bool))
_TEXT: Final = AllowedValues("a string", _is_plain_text)
_NUMBERS: Final = AllowedValues("a number or a list of numbers", _is_numbers)
_LABELS: Final = AllowedValues("a mapping of labels", _is_labels)
# A name with a colon would specify a location from which the model is downloaded.
_MODEL_NAME: Final = AllowedValues(
    "the name of a model in the library",
    lambda value: isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) is not None,
)


# torch.compile ------------------------------------------------------------------------------------------------------

# Torch backends that neither import other packages nor start programs that the configuration selects.
_BACKENDS: Final = ("aot_eager", "cudagraphs", "eager", "inductor")


def _is_backend(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    if value in _BACKENDS:
        return True
    dynamo: Any = import_module("torch._dynamo")
    # If a backend is registered as an entry point of a package, selecting it imports the package.
    announced = {entry.name for entry in importlib.metadata.entry_points(group="torch_dynamo_backends")}
    if value in announced or value not in dynamo.list_backends(exclude_tags=()):
        return False
    return not str(getattr(dynamo.lookup_backend(value), "__module__", "torch.")).startswith("torch.")


def _is_mode(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in import_object("torch._inductor:list_mode_options")())


_COMPILE: Final = DataRules(
    lambda target: (getattr(target, "__module__", None), getattr(target, "__name__", None)) == ("torch", "compile"),
    {
        "mode": AllowedValues("a mode of torch.compile, such as 'max-autotune'", _is_mode),
        "fullgraph": _FLAG,
        "dynamic": AllowedValues("True, False or None", lambda value: value is None or isinstance(value, bool)),
        "disable": _FLAG,
        "backend": AllowedValues(
            "the name of a torch backend, or of a backend that the program registered", _is_backend
        ),
        "target": AllowedValues(
            "the name of a public method of the model",
            lambda value: isinstance(value, str) and value.isidentifier() and not value.startswith("_"),
        ),
    },
)


# Process groups -----------------------------------------------------------------------------------------------------

# Ranks send each other pickled objects, so an attacker who chooses the rendezvous address could send one.
_PROCESS_GROUP: Final = DataRules(
    lambda target: (
        (getattr(target, "__module__", None), getattr(target, "__name__", None))
        == ("stratagem.distributed.rendezvous.process_group", "init_dist")
    ),
    {
        "backend": _TEXT,
        "timeout": _NUMBERS,
        "launcher": _TEXT,
        "group_name": _TEXT,
    },
)


# Trackers -----------------------------------------------------------------------------------------------------------


def _tracker_rules(module: str, **allowed: AllowedValues) -> DataRules:
    """Return the rules for a tracker. Only the program may choose the server or the account that receives the values of a run."""
    return DataRules(
        lambda target: getattr(target, "__module__", None) == f"stratagem.train.trackers.{module}",
        {"queue_size": _NUMBERS, "flush_s": _NUMBERS, "name": _TEXT, **allowed},
    )


_TRACKERS: Final = (
    _tracker_rules(
        "wandb",
        project=_TEXT,
        group=_TEXT,
        notes=_TEXT,
        tags=AllowedValues(
            "a list of strings", lambda value: isinstance(value, list) and all(map(_is_plain_text, value))
        ),
        mode=_TEXT,
    ),
    _tracker_rules("mlflow", experiment=_TEXT, tags=_LABELS),
    _tracker_rules("trackio", project=_TEXT, group=_TEXT),
)


# Model libraries ----------------------------------------------------------------------------------------------------


def _comes_from(target: Any, *modules: str) -> bool:
    """Return whether a target, or the function of a ``partial``, is defined in or below one of the modules."""
    function = target.func if isinstance(target, partial) else target
    where = getattr(function, "__module__", None)
    return isinstance(where, str) and any(where == module or where.startswith(f"{module}.") for module in modules)


def _owner(target: Any) -> type | None:
    owner = target if isinstance(target, type) else getattr(target, "__self__", None)
    return owner if isinstance(owner, type) else None


def _bases(target: Any) -> set[str]:
    """Return the names of the transformers base classes of a class, or of the class that a class method belongs to."""
    owner = _owner(target)
    return set() if owner is None else {base.__name__ for base in owner.__mro__ if _comes_from(base, "transformers")}


_MODELS: Final = frozenset({"PreTrainedModel", "_BaseAutoModelClass"})


def _is_from_pretrained(target: Any) -> bool:
    return isinstance(target, types.MethodType) and target.__name__ == "from_pretrained" and bool(_bases(target))


def _loads_model(target: Any) -> bool:
    return _is_from_pretrained(target) and bool(_bases(target) & _MODELS)


def _makes_model(target: Any) -> bool:
    """Return whether the target is a transformers model, or a function or class method of the transformers library."""
    if isinstance(target, type):
        # Exclude subclasses that the program defines.
        return _comes_from(target, "transformers") and bool(_bases(target) & _MODELS)
    return _comes_from(target, "transformers") or (isinstance(target, types.MethodType) and bool(_bases(target)))


_SOURCE: Final = {
    "pretrained_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "subfolder": _TEXT,
    "local_files_only": _FLAG,
    "force_download": _FLAG,
    "trust_remote_code": _one_of(False),
}
_DTYPES: Final = _one_of("auto", "bfloat16", "float16", "float32", "float64")
_TRANSFORMERS_MODEL: Final = DataRules(
    _loads_model,
    {
        **_SOURCE,
        "variant": _TEXT,
        "use_safetensors": _one_of(True),
        # Other implementations may download compiled code.
        "attn_implementation": _one_of("eager", "sdpa", "flex_attention"),
        **dict.fromkeys(("dtype", "torch_dtype"), _DTYPES),
        **dict.fromkeys(
            (
                "ignore_mismatched_sizes", "low_cpu_mem_usage", "output_attentions", "output_hidden_states",
                "tie_word_embeddings", "use_cache", "add_pooling_layer", "gradient_checkpointing",
            ),
            _FLAG,
        ),
        **dict.fromkeys(("id2label", "label2id"), _LABELS),
        **dict.fromkeys(
            (
                "num_labels", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout",
                "dropout", "drop_path_rate", "embd_pdrop", "hidden_dropout_prob", "layerdrop", "resid_pdrop",
                "summary_first_dropout", "image_size", "max_position_embeddings", "pad_token_id", "bos_token_id",
                "eos_token_id", "vocab_size", "initializer_range", "layer_norm_eps", "num_hidden_layers",
            ),
            _NUMBERS,
        ),
        "problem_type": _one_of("regression", "single_label_classification", "multi_label_classification"),
    },
    # If trust_remote_code is not set, transformers asks in the terminal whether to run code from the repository.
    {"use_safetensors": True, "trust_remote_code": False},
)  # fmt: skip
_TRANSFORMERS_PART: Final = DataRules(_is_from_pretrained, _SOURCE, {"trust_remote_code": False})
_TRANSFORMERS_OTHER: Final = DataRules(_makes_model)

_TIMM: Final = DataRules(
    lambda target: _comes_from(target, "timm") and not isinstance(target, type),
    {
        "model_name": _MODEL_NAME,
        **dict.fromkeys(
            ("pretrained", "features_only", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "class_token",
             "qkv_bias", "qk_norm", "zero_init_last", "scriptable", "exportable", "no_jit"),
            _FLAG,
        ),
        **dict.fromkeys(
            (
                "num_classes", "in_chans", "drop_rate", "drop_path_rate", "drop_block_rate", "proj_drop_rate",
                "attn_drop_rate", "pos_drop_rate", "patch_drop_rate", "head_drop_rate", "img_size", "patch_size",
                "window_size", "embed_dim", "depth", "depths", "dims", "num_heads", "mlp_ratio", "reg_tokens",
                "init_values", "out_indices", "output_stride", "layers", "channels", "stem_width", "base_width",
                "cardinality",
            ),
            _NUMBERS,
        ),
        "global_pool": _TEXT,
    },
)  # fmt: skip

_TORCHVISION: Final = DataRules(
    lambda target: _comes_from(target, "torchvision.models") and not isinstance(target, type),
    {
        "name": _MODEL_NAME,
        **dict.fromkeys(
            ("weights", "weights_backbone"),
            AllowedValues(
                "the name of weights in the library, such as 'DEFAULT'",
                lambda value: value is None or (isinstance(value, str) and re.fullmatch(r"[\w.]+", value) is not None),
            ),
        ),
        **dict.fromkeys(
            ("progress", "pretrained", "quantize", "transform_input", "aux_loss", "aux_logits", "init_weights",
             "zero_init_residual", "reduced_tail", "memory_efficient", "norm_first"),
            _FLAG,
        ),
        **dict.fromkeys(
            (
                "num_classes", "num_keypoints", "dropout", "stochastic_depth_prob", "attention_dropout", "drop_rate",
                "width_mult", "groups", "width_per_group", "replace_stride_with_dilation", "image_size", "min_size",
                "max_size", "image_mean", "image_std", "trainable_backbone_layers", "box_score_thresh",
                "box_nms_thresh", "box_detections_per_img", "score_thresh", "nms_thresh", "detections_per_img",
                "topk_candidates",
            ),
            _NUMBERS,
        ),
    },
)  # fmt: skip

# heavyball accepts the name of any function in its helper module as a string.
_HEAVYBALL: Final = DataRules(
    lambda target: _comes_from(target, "heavyball"),
    {
        **dict.fromkeys(("storage_dtype", "q_dtype"), _one_of("bfloat16", "float16", "float32", "float64")),
        **dict.fromkeys(
            ("gradient_clipping", "update_clipping"),
            _one_of(
                None, "l2_clip_", "rmsnorm_clip_", "global_l2norm_clip", "global_rmsnorm_clip", "l2_normalization_",
                "rmsnorm_normalize_", "mu_law_compress", "a_law_compress", "trust_region_clip_",
            ),
        ),
        **dict.fromkeys(("ecc", "param_ecc"), _TEXT),
    },
    others=_NUMBERS,
)  # fmt: skip


# No arguments allowed -----------------------------------------------------------------------------------------------

# Functions that unpickle, import, compile or download the object that an argument names. Data files may not set any of
# their arguments.
_LOADERS: Final = DataRules(
    lambda target: _comes_from(
        target,
        "torch.hub", "torch.serialization", "torch.jit", "torch.package", "torch.export", "torch.fx",
        "torch.utils.cpp_extension", "torch.distributed.rpc", "torch.utils.model_zoo", "torch._inductor",
    )
)  # fmt: skip
# Metrics that load a model by name or path.
_MODEL_METRICS: Final = DataRules(
    lambda target: _comes_from(
        target,
        "torchmetrics.functional", "torchmetrics.multimodal", "torchmetrics.video", "torchmetrics.text.bert",
        "torchmetrics.text.infolm", "torchmetrics.text.rouge", "torchmetrics.image.arniqa", "torchmetrics.image.dists",
        "torchmetrics.image.fid", "torchmetrics.image.inception", "torchmetrics.image.kid", "torchmetrics.image.lpip",
        "torchmetrics.image.mifid", "torchmetrics.image.perceptual_path_length", "torchmetrics.audio.dnsmos",
        "torchmetrics.audio.nisqa",
    )
)  # fmt: skip

# The first matching rule is used.
_RULES: Final = (
    _COMPILE, _PROCESS_GROUP, _TRANSFORMERS_MODEL, _TRANSFORMERS_PART, _TRANSFORMERS_OTHER, _TIMM, _TORCHVISION,
    _HEAVYBALL, _LOADERS, _MODEL_METRICS, *_TRACKERS,
)  # fmt: skip
