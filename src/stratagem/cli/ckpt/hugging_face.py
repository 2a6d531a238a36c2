"""Implement ``stratagem ckpt convert --to huggingface`` with the model of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from rich.filesize import decimal

from stratagem.checkpoint.convert.hugging_face import export_hugging_face
from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.output import echo, status
from stratagem.config import require
from stratagem.config_schema import SECTIONS
from stratagem.errors import ConfigKeyError
from stratagem.registry import switch_scope
from stratagem.storage import tree_bytes
from stratagem.strategies.setup.building import build_model, with_preprocessor
from stratagem.utils import is_url, mask_text

__all__ = ["FolderOptions", "write_folder"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FolderOptions:
    """The options of ``ckpt convert --to huggingface``.

    Attributes:
        config: the configuration of the run, whose model is built; None to write only the weights.
        overrides: changes of the configuration.
        module: the module to export.
        tokenizer: the tokenizer whose files are added.
        merge_adapters: whether to merge PEFT adapters.
    """

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    module: str | None = None
    tokenizer: str | None = None
    merge_adapters: bool = False

    @property
    def given(self) -> list[str]:
        """The names of the options that were given."""
        options = {
            "--config": self.config,
            "--set": self.overrides,
            "--tokenizer": self.tokenizer,
            "--merge-adapters": self.merge_adapters,
        }
        return [name for name, value in options.items() if value]


def write_folder(source: str, target: Path, config_file: Path, options: FolderOptions, *, raw: bool) -> None:
    """Build the model of the configuration, load the checkpoint, and write a folder for ``from_pretrained``.

    Raises:
        ConfigError: or a subclass, if the configuration is invalid or has no model.
        CheckpointError: or a subclass, if the model or the checkpoint cannot be exported.
    """
    config = read_config(RunOptions(config=config_file, overrides=options.overrides))
    require(config, SECTIONS, scope=config.get("default_scope"))
    if config.get("model") is None:
        raise ConfigKeyError(f"{config.filename} has no model to export.")
    with status(f"Converting {mask_text(source)} ..."), switch_scope(config.get("default_scope")):
        written = export_hugging_face(
            source if is_url(source) else Path(source),
            target,
            build_model(with_preprocessor(config["model"], config.get("data_preprocessor"))),
            module=options.module,
            tokenizer=options.tokenizer,
            merge_adapters=options.merge_adapters,
            raw=raw,
        )
    echo(f"Wrote {target} ({decimal(tree_bytes(target))}): {', '.join(written.files)}.")
    if written.averaged:
        echo("Wrote the averaged weights, which the run used for evaluation. Use --raw to write the trained weights.")
    if written.left_out:
        echo(f"Left out, because it is outside of {written.module!r}: {', '.join(written.left_out)}.")
    if options.tokenizer is None:
        echo("The folder has no tokenizer. Add one with --tokenizer PATH.")
    if written.is_adapter:
        echo(
            f"The folder contains the adapter: PeftModel.from_pretrained(base_model, {str(target)!r}). Use --merge-adapters to "
            "write the whole model."
        )
    else:
        echo(f"Open it with {written.model}.from_pretrained({str(target)!r}).")
