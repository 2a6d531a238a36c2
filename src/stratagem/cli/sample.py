"""Implement ``stratagem sample``: generate text with the language model of a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
import typer

from stratagem.checkpoint import find_latest_checkpoint
from stratagem.cli.options import RunOptions, read_config
from stratagem.config import Config, require
from stratagem.config_schema import SECTIONS
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.model import TextGenerator, Tokenizer
from stratagem.registry import TOKENIZERS, switch_scope
from stratagem.strategies import SingleDeviceStrategy
from stratagem.strategies.setup.building import with_preprocessor
from stratagem.utils import is_url, set_random_seed

__all__ = ["Request", "sample"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of ``stratagem sample``.

    Attributes:
        prompt: the text to continue.
        tokens: number of tokens to generate.
        temperature: sampling temperature; 0 always chooses the most likely token.
        top_k: number of most likely tokens to sample from; 0 for all.
        seed: the random seed.
    """

    prompt: str
    tokens: int
    temperature: float
    top_k: int
    seed: int


def sample(options: RunOptions, request: Request, *, checkpoint: str) -> None:
    """Print the prompt and its continuation by the model of a checkpoint. Writes no files.

    Runs in one process, independent of the strategy and the number of processes that saved the checkpoint.

    Args:
        options: the configuration.
        request: the prompt and the sampling options.
        checkpoint: path or URL of the checkpoint, or the folder of a run to use its latest one.

    Raises:
        ConfigKeyError: if the configuration has no model or no tokenizer.
        ConfigTypeError: if the model cannot generate text, or the tokenizer lacks a method.
        ConfigValueError: if the prompt has no tokens.
        CheckpointError: or a subclass, if the checkpoint cannot be read or belongs to a different model.
    """
    config = read_config(options)
    # Sampling always uses SingleDeviceStrategy, which does not accept the options of the training strategy.
    config.pop("strategy", None)
    require(config, SECTIONS, scope=config.get("default_scope"))
    with switch_scope(config.get("default_scope")):
        tokenizer = _tokenizer(config)
        prompt = list(tokenizer.encode(request.prompt))
        if not prompt:
            raise ConfigValueError(f"--prompt {request.prompt!r} has no tokens; at least one is required.")
        tokens = _generate(config, prompt, request, checkpoint)
    typer.echo(tokenizer.decode(tokens))


def _tokenizer(config: Config) -> Tokenizer:
    if not isinstance(config.get("tokenizer"), Mapping):
        raise ConfigKeyError(
            f"{config.filename} has no tokenizer. Register a class with encode() and decode() in TOKENIZERS, and set "
            "tokenizer = dict(type=<its name>)."
        )
    tokenizer = TOKENIZERS.build(config["tokenizer"])
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigTypeError(
            f"tokenizer: {type(tokenizer).__name__} is not a tokenizer: it must have the methods encode() and decode()."
        )
    return tokenizer


def _generate(config: Config, prompt: list[int], request: Request, checkpoint: str) -> list[int]:
    """Return the tokens of the prompt, followed by the generated tokens."""
    # The search finds nothing if the path is itself a checkpoint.
    path = checkpoint if is_url(checkpoint) else find_latest_checkpoint(checkpoint) or checkpoint
    with tempfile.TemporaryDirectory(prefix="stratagem-sample-") as folder:
        strategy = SingleDeviceStrategy(
            work_dir=folder,
            env_kwargs={"randomness": {"seed": request.seed}},
            log_kwargs={"log_level": "WARNING"},
        )
        try:
            model = _prepare(strategy, config)
            strategy.load_checkpoint(path, strict=True)
            strategy.model.eval()
            # Building the model has advanced the random number generators.
            set_random_seed(request.seed)
            generated = model.generate(
                torch.tensor([prompt], device=strategy.world.device),
                max_new_tokens=request.tokens,
                do_sample=request.temperature > 0,
                temperature=request.temperature or 1.0,
                top_k=request.top_k,
            )
            tokens: list[int] = generated[0].tolist()
        finally:
            strategy.close()
    return tokens


def _prepare(strategy: SingleDeviceStrategy, config: Config) -> TextGenerator:
    if config.get("model") is None:
        raise ConfigKeyError(f"{config.filename} has no model to sample from.")
    # The checkpoint replaces the weights, so there is no need to initialize them.
    strategy.prepare(
        with_preprocessor(config["model"], config.get("data_preprocessor")),
        dispatch_kwargs={"init_weights_for_test_or_val": False},
    )
    model = strategy.unwrap_model()
    if not isinstance(model, TextGenerator):
        raise ConfigTypeError(
            f"{type(model).__name__} cannot generate text: it has no method generate(tokens, *, max_new_tokens, do_sample, "
            "temperature, top_k). See stratagem.model.TextGenerator."
        )
    return model
