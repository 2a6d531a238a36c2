"""Export a module of a checkpoint for inference: as a program of ``torch.export`` or an ONNX file, checked numerically."""

from __future__ import annotations

import inspect
import logging
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stratagem.checkpoint.convert.program_inputs import ModuleInputs, captured_inputs
from stratagem.checkpoint.convert.weights import load_exported_weights
from stratagem.checkpoint.errors import save_error
from stratagem.errors import CheckpointError, ConfigValueError
from stratagem.model import ModelWithLoss, SupervisedModel, unwrap_model
from stratagem.utils import absolute, did_you_mean
from stratagem.utils.imports import import_module

__all__ = ["PROGRAM_FORMATS", "ExportedFile", "export_program", "require_program_target"]

# The formats and the suffixes of their files.
PROGRAM_FORMATS: Final = {"torch-export": ".pt2", "onnx": ".onnx"}
# The largest difference relative to the largest absolute value of an output, by dtype.
_TOLERANCES: Final = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The number of samples in the traced call, and those in the calls that are compared.
_TRACED: Final = 2
_COMPARED: Final = (1, 5)
# ONNX files are protocol buffers of at most 2 GiB; larger weights are written to a second file.
_MAX_ONNX_BYTES: Final = 1_900_000_000
_TORCH = str(Path(torch.__file__).parent)

# Runs an exported file.
Program = Callable[[ModuleInputs], Sequence[Tensor]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """What :func:`export_program` wrote.

    Attributes:
        module: the name of the module in the trained model; "." for the whole model.
        type: the class of the module.
        averaged: whether the weights are the averaged weights.
        inputs: the dtypes and shapes of the inputs, with ``batch`` for the number of samples.
        sizes: the numbers of samples with which the file was compared with the module.
        difference: the largest difference of an output, relative to the largest absolute value of that output.
        tolerance: the largest difference that was permitted, for the outputs with the smallest tolerance.
        files: the names of the files.
    """

    module: str
    type: str
    averaged: bool
    inputs: str
    sizes: tuple[int, ...]
    difference: float
    tolerance: float
    files: list[str]


def export_program(
    source: str | Path,
    target: str | Path,
    model: nn.Module,
    inputs: Any = None,
    *,
    batch: Any = None,
    to: str = "torch-export",
    module: str | None = None,
    raw: bool = False,
    tolerance: float | None = None,
) -> ExportedFile:
    """Load a checkpoint into ``model``, and write a module of it as a file that runs without Stratagem and without its code.

    The first dimension of the inputs may have any size. Before the file is published, it is loaded, and its outputs for 1 and 5
    samples are compared with those of the module.

    Args:
        source: the checkpoint to read, a path or a URL, saved under any strategy.
        target: the file to write, which must not exist: ``.pt2`` for torch-export, ``.onnx`` for onnx.
        model: the model that was trained, or an equal one. Its weights are replaced, and it is put into evaluation mode.
        inputs: the inputs of the module: a mapping (keyword arguments), a tuple or list (positional arguments), or a tensor.
        batch: instead of ``inputs``, a batch of the data. The inputs are those of the module in the prediction of it.
        to: ``"torch-export"``, or ``"onnx"``, which requires the packages of ``stratagem[onnx]``.
        module: the name of the module to export; "." is the model itself. By default, the ``network`` of ``SupervisedModel`` and
            ``ModelWithLoss``, and otherwise the model.
        raw: whether to export the trained weights even if the run averaged its weights.
        tolerance: the largest permitted difference of an output, relative to its largest absolute value. By default 1e-4 for
            float32, 1e-9 for float64, 1e-2 for float16 and 5e-2 for bfloat16; integers must be equal.

    Raises:
        ConfigValueError: if an argument is invalid.
        CheckpointError: if ``target`` exists, the checkpoint does not match the model, the module cannot be exported, or the
            outputs of the file differ.
        MissingDependencyError: if a package for ONNX is not installed.
    """
    path = require_program_target(target, to)
    if (inputs is None) == (batch is None):
        raise ConfigValueError("Pass either inputs, the arguments of the module, or batch, a batch of the data.")
    trained = unwrap_model(model)
    name, network = _module_of(trained, module)
    averaged = load_exported_weights(trained, source, raw=raw)
    trained.eval()
    found = ModuleInputs.given(inputs) if batch is None else _inputs_of(trained, network, batch)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder, _quiet():
            program = _trace(network, name, found.resized(_TRACED))
            run = (
                _write_onnx(program, Path(folder) / path.name) if to == "onnx" else _write_torch(program, folder, path)
            )
            difference, permitted = _compare(network, run, found, to, tolerance)
            # The weights of a large ONNX file come first: the file with the name of the target is published last.
            files = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)
            for file in files:
                file.replace(path.parent / file.name)
    except OSError as error:
        raise save_error(path, error) from error
    return ExportedFile(
        module=name,
        type=type(network).__name__,
        averaged=averaged,
        inputs=found.describe(),
        sizes=_COMPARED,
        difference=difference,
        tolerance=permitted,
        files=sorted(file.name for file in files),
    )


def require_program_target(target: str | Path, to: str) -> Path:
    """Return the absolute path of the file to write.

    Raises:
        ConfigValueError: if the format is unknown.
        CheckpointError: if the target exists, has another suffix, or its folder does not exist.
    """
    if to not in PROGRAM_FORMATS:
        raise ConfigValueError(f"There is no export format {to!r}. {did_you_mean(to, PROGRAM_FORMATS)}")
    path = absolute(target)
    if path.suffix != PROGRAM_FORMATS[to]:
        raise CheckpointError(f"An export to {to} is a file {PROGRAM_FORMATS[to]}, but {target} does not end in it.")
    if path.exists():
        raise CheckpointError(f"{path} already exists. Choose a different target, or remove it first.")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent} is not a directory. Create it, or choose a different target.")
    return path


def _module_of(model: nn.Module, module: str | None) -> tuple[str, nn.Module]:
    if module is None:
        return ("network", model.network) if isinstance(model, SupervisedModel | ModelWithLoss) else (".", model)
    if module == ".":
        return ".", model
    modules = dict(model.named_modules())
    if module not in modules:
        raise CheckpointError(
            f"{type(model).__name__} has no module {module!r}. {did_you_mean(module, [name for name in modules if name])}"
        )
    return module, modules[module]


def _inputs_of(model: nn.Module, network: nn.Module, batch: Any) -> ModuleInputs:
    found = captured_inputs(model, network, batch)
    if not isinstance(model, ModelWithLoss) or network is not model.network or model.target_key not in found.kwargs:
        return found
    # A prediction needs no labels, which do not exist for new data.
    kwargs = {key: value for key, value in found.kwargs.items() if key != model.target_key}
    try:
        without = ModuleInputs.of(found.args, kwargs)
        _call(network, without)
    except Exception:  # noqa: BLE001 -- any error means that the network requires its labels
        return found
    return without


def _call(network: nn.Module, inputs: ModuleInputs) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(network(*inputs.args, **inputs.kwargs))


def _tensors(outputs: Any) -> list[Tensor]:
    return [each for each in tree_leaves(outputs) if isinstance(each, Tensor)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the log lines and deprecation warnings of the exporters, whose errors are reported instead."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _trace(network: nn.Module, name: str, inputs: ModuleInputs) -> torch.export.ExportedProgram:
    what = f"{type(network).__name__} ({name})"
    try:
        if not _call(network, inputs):
            raise CheckpointError(f"{what} returns no tensors, so there is nothing to export. Select another module.")
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"The forward pass of {what} failed with {inputs.describe()}{_where(error)}: {type(error).__name__}: {error}. "
            "Correct the inputs (--input), or select another module with module (--module)."
        ) from error
    positional, named = inputs.dynamic_shapes(torch.export.Dim.DYNAMIC)
    shapes = inspect.signature(network.forward).bind(*positional, **named).arguments
    try:
        with torch.no_grad():
            return torch.export.export(network, inputs.args, inputs.kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise CheckpointError(
            f"torch.export cannot export {what}{_where(error)}: {_first_line(error)} {_advice(str(error))}"
        ) from error


def _where(error: BaseException) -> str:
    """Return the last line outside of torch that an error passed, as text."""
    frames = [
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith((_TORCH, "<")) and frame.f_code.co_filename != __file__
    ]
    return " at {}:{} in {}".format(*frames[-1]) if frames else ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    # The second line names the dimension that a constraint violates.
    shown = lines[: 2 if lines and lines[0].startswith("Constraints violated") else 1]
    return f"{type(error).__name__}: {' '.join(shown) or 'no message'}"


def _advice(text: str) -> str:
    if "data-dependent" in text:
        return (
            "The code depends on the values of tensors, such as in `if x.sum() > 0` or `x[mask]`: use torch.where or torch.cond, "
            "or export a part of the model with module (--module)."
        )
    if "specialized it to be a constant" in text:
        return (
            "The code uses a fixed number of samples, such as in reshape(2, -1): use x.shape[0] or -1 for the first dimension, "
            "or export a part of the model with module (--module)."
        )
    return (
        "Change this code, export a part of the model with module (--module), or write the weights with "
        "`stratagem ckpt convert --to state_dict`."
    )


def _write_torch(program: torch.export.ExportedProgram, folder: str, path: Path) -> Program:
    file = Path(folder) / path.name
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()
    return lambda inputs: _call(loaded, inputs)


def _write_onnx(program: torch.export.ExportedProgram, file: Path) -> Program:
    for package in ("onnx", "onnxscript"):
        import_module(package, extra="onnx")
    runtime: Any = import_module("onnxruntime", extra="onnx")
    try:
        converted: Any = torch.onnx.export(program, dynamo=True, verbose=False)
        size = sum(each.numel() * each.element_size() for each in program.state_dict.values())
        converted.save(file, external_data=size > _MAX_ONNX_BYTES)
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"The module was exported by torch.export, but cannot be written as ONNX: {_first_line(error)} Use "
            "--to torch-export, or replace the operator that this error names."
        ) from error
    names = [each.name for each in session.get_inputs()]

    def run(inputs: ModuleInputs) -> list[Tensor]:
        if len(names) != len(inputs.tensors):
            raise CheckpointError(
                f"The ONNX file has the inputs {', '.join(names)}, but the module has {inputs.describe()}. Omit the inputs "
                "that it does not use, with --input."
            )
        values = dict(zip(names, (each.numpy() for each in inputs.tensors), strict=True))
        return [torch.from_numpy(each) for each in session.run(None, values)]

    return run


def _compare(
    network: nn.Module, run: Program, inputs: ModuleInputs, to: str, tolerance: float | None
) -> tuple[float, float]:
    """Return the largest relative difference between the module and the file, and the smallest tolerance.

    Raises:
        CheckpointError: if an output differs by more than the tolerance.
    """
    largest, smallest = 0.0, tolerance if tolerance is not None else max(_TOLERANCES.values())
    for size in _COMPARED:
        batch = inputs.resized(size)
        try:
            found = run(batch)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"The exported file fails with {size} samples ({type(error).__name__}: {_first_line(error)}), so it was not "
                "written. The code may use a fixed number of samples. Export a part of the model with module (--module)."
            ) from error
        expected = _call(network, batch)
        if len(found) != len(expected):
            raise CheckpointError(
                f"The exported file returns {len(found)} tensors instead of {len(expected)}, so it was not written."
            )
        for index, (own, other) in enumerate(zip(expected, found, strict=True)):
            permitted = (
                _TOLERANCES.get(own.dtype, 0.0) if tolerance is None or not own.is_floating_point() else tolerance
            )
            difference = _difference(own, other)
            if not difference <= permitted:
                raise CheckpointError(
                    f"Output {index} of the exported file ({to}) differs from that of {type(network).__name__} by "
                    f"{difference:.2g} of its largest value with {size} samples, and {permitted:.2g} is permitted, so the file "
                    "was not written. If the module is random in evaluation mode, remove the randomness; if the difference is "
                    "acceptable, use tolerance (--tolerance)."
                )
            largest, smallest = max(largest, difference), min(smallest, permitted)
    return largest, smallest


def _difference(own: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference relative to the largest absolute value; infinity if shapes or NaN differ."""
    if own.shape != other.shape or own.dtype != other.dtype:
        return float("inf")
    own, other = own.double(), other.double()
    equal = (own == other) | (own.isnan() & other.isnan())
    if bool(equal.all()):
        return 0.0
    scale = float(own[own.isfinite()].abs().max()) if bool(own.isfinite().any()) else 1.0
    difference = float((own - other)[~equal].abs().max())
    return difference / (scale or 1.0) if difference == difference else float("inf")  # noqa: PLR0124 -- not NaN
