"""Implement ``stratagem export``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from rich.filesize import decimal
from torch import Tensor
from torch.utils._pytree import tree_map

from stratagem.checkpoint.convert.program import export_program, require_program_target
from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.output import echo, print_json, status
from stratagem.config import Config, require
from stratagem.config_schema import SECTIONS
from stratagem.data import build_dataloader, in_dataset_order
from stratagem.errors import ConfigKeyError
from stratagem.planning.batch import parse_batch
from stratagem.registry import switch_scope
from stratagem.strategies.setup.building import build_model, with_preprocessor
from stratagem.train.evaluation.sets import named_loaders
from stratagem.utils import is_url, mask_text

__all__ = ["ExportSettings", "export"]

# The data from which the inputs are taken: the first of these sections that the configuration has.
_DATA: Final = ("predict_dataloader", "test_dataloader", "val_dataloader", "train_dataloader")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """The options of ``stratagem export``.

    Attributes:
        form: the format, as in ``--to``.
        out: the file to write.
        module: the module to export.
        inputs: a description of the inputs.
        tolerance: the largest permitted difference.
        raw: whether to export the trained weights instead of the averaged ones.
    """

    form: str
    out: Path
    module: str | None
    inputs: str | None
    tolerance: float | None
    raw: bool


def export(options: RunOptions, checkpoint: str, settings: ExportSettings, *, as_json: bool) -> None:
    """Export the module of a checkpoint for inference, compare the file with the module, and print the largest difference.

    Raises:
        ConfigError: or a subclass, if the configuration or an option is invalid.
        CheckpointError: or a subclass, if the checkpoint cannot be loaded or the module cannot be exported.
    """
    require_program_target(settings.out, settings.form)
    config = read_config(options)
    require(config, SECTIONS, scope=config.get("default_scope"))
    if config.get("model") is None:
        raise ConfigKeyError(f"{config.filename} has no model to export.")
    with status(f"Exporting {mask_text(checkpoint)} ..."), switch_scope(config.get("default_scope")):
        inputs, batch = _inputs(config, settings.inputs)
        written = export_program(
            checkpoint if is_url(checkpoint) else Path(checkpoint),
            settings.out,
            build_model(with_preprocessor(config["model"], config.get("data_preprocessor"))),
            inputs,
            batch=batch,
            to=settings.form,
            module=settings.module,
            raw=settings.raw,
            tolerance=settings.tolerance,
        )
    if as_json:
        print_json(asdict(written))
        return
    of = "the whole model" if written.module == "." else f"the module {written.module!r}"
    size = sum((settings.out.parent / file).stat().st_size for file in written.files)
    echo(f"Wrote {of} ({written.type}) to {settings.out} ({decimal(size)}). Inputs: {written.inputs}.")
    if written.averaged:
        echo("Wrote the averaged weights, which the run used for evaluation. Use --raw to write the trained weights.")
    echo(
        f"With {' and '.join(map(str, written.sizes))} samples, the outputs differ from those of the model by at most "
        f"{written.difference:.2g} of the largest value; {written.tolerance:.2g} is permitted."
    )
    if settings.form == "onnx":
        echo(f"Open it with onnxruntime.InferenceSession({str(settings.out)!r}).")
    else:
        echo(f"Open it with torch.export.load({str(settings.out)!r}).module().")


def _inputs(config: Config, text: str | None) -> tuple[Any, Any]:
    """Return the inputs of the module that a description specifies, or else a batch of the data; the other one is None."""
    if text is not None:
        return tree_map(_values, parse_batch(text).batch), None
    name = next((each for each in _DATA if config.get(each) is not None), None)
    if name is None:
        raise ConfigKeyError(
            f"{config.filename} has no data from which the inputs of the model are taken. Describe them: "
            "--input 'float32[8,3,32,32]', or by name: --input 'input_ids=int64[8,128],attention_mask=int64[8,128]'."
        )
    section = config[name]
    named = named_loaders(section, name)
    if named is not None:
        section = next(iter(named.values()))
    if isinstance(section, Mapping):
        # The first batch is read in this process.
        section = {key: value for key, value in section.items() if key not in _OF_WORKERS} | {"num_workers": 0}
    loader = build_dataloader(in_dataset_order(section, every_sample=True), seed=0, training=False)
    return None, next(iter(loader.batches(0)))


_OF_WORKERS: Final = ("persistent_workers", "prefetch_factor", "multiprocessing_context")


def _values(value: Any) -> Any:
    """Return a tensor with values: integers are 0 or 1, which are valid tokens and masks."""
    if not isinstance(value, Tensor):
        return value
    generator = torch.Generator().manual_seed(0)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return torch.randn(value.shape, dtype=value.dtype, generator=generator)
    return torch.randint(2, value.shape, generator=generator).to(value.dtype)
