"""``stratagem sample``."""

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
    """What is to be written.

    Attributes:
        prompt: the text to go on with.
        tokens: how many tokens are added.
        temperature: below 1 for likelier tokens, above for rarer ones; 0 for always the likeliest.
        top_k: how many of the likeliest tokens are drawn from; 0 for all.
        seed: of the random numbers.
    """

    prompt: str
    tokens: int
    temperature: float
    top_k: int
    seed: int


def sample(options: RunOptions, request: Request, *, checkpoint: str) -> None:
    """Print the prompt and how the model of a checkpoint goes on. Writes nothing.

    One process is enough, whatever strategy and however many processes saved the checkpoint.

    Args:
        options: which configuration.
        request: what is to be written.
        checkpoint: its place, or the folder of a run for the latest there.

    Raises:
        ConfigKeyError: if the configuration names no model or no tokenizer.
        ConfigTypeError: if the model writes no text, or the tokenizer is none.
        ConfigValueError: if the prompt is empty, or the tokenizer does not know what stands in it.
        CheckpointError: in one of its kinds, if the checkpoint cannot be read or is another model's.
    """
    config = read_config(options)
    # One process writes, whatever trained; options of a strategy that only the training names would be nobody's here.
    config.pop("strategy", None)
    require(config, SECTIONS, scope=config.get("default_scope"))
    with switch_scope(config.get("default_scope")):
        tokenizer = _tokenizer(config)
        prompt = list(tokenizer.encode(request.prompt))
        if not prompt:
            raise ConfigValueError(f"--prompt {request.prompt!r} has no token, and a model goes on with at least one.")
        tokens = _written(config, prompt, request, checkpoint)
    typer.echo(tokenizer.decode(tokens))


def _tokenizer(config: Config) -> Tokenizer:
    if not isinstance(config.get("tokenizer"), Mapping):
        raise ConfigKeyError(
            f"{config.filename} names no tokenizer, so what the tokens of its model mean is not known. Register a class "
            "with encode and decode in TOKENIZERS, and write tokenizer = dict(type=<its name>)."
        )
    tokenizer = TOKENIZERS.build(config["tokenizer"])
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigTypeError(
            f"tokenizer: {type(tokenizer).__name__} has no methods encode and decode, so it is no tokenizer."
        )
    return tokenizer


def _written(config: Config, prompt: list[int], request: Request, checkpoint: str) -> list[int]:
    """Return the prompt's tokens and those that follow."""
    # Of a folder that is no run's, and of an address, nothing is found.
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
            # Building the model drew from the same generators.
            set_random_seed(request.seed)
            written = model.generate(
                torch.tensor([prompt], device=strategy.world.device),
                max_new_tokens=request.tokens,
                do_sample=request.temperature > 0,
                temperature=request.temperature or 1.0,
                top_k=request.top_k,
            )
            tokens: list[int] = written[0].tolist()
        finally:
            strategy.close()
    return tokens


def _prepare(strategy: SingleDeviceStrategy, config: Config) -> TextGenerator:
    if config.get("model") is None:
        raise ConfigKeyError(f"{config.filename} names no model: there is nothing to sample from.")
    # A checkpoint follows.
    strategy.prepare(
        with_preprocessor(config["model"], config.get("data_preprocessor")),
        dispatch_kwargs={"init_weights_for_test_or_val": False},
    )
    model = strategy.unwrap_model()
    if not isinstance(model, TextGenerator):
        raise ConfigTypeError(
            f"{type(model).__name__} has no method generate(tokens, *, max_new_tokens, do_sample, temperature, top_k), so it "
            "writes no text. See stratagem.model.TextGenerator."
        )
    return model
