"""``stratagem sample`` works with any model that can generate; the example's test generates real text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem import SingleDeviceStrategy
from stratagem.model import BaseModel
from stratagem.registry import MODELS, TOKENIZERS

Command = Callable[..., Any]
CONFIG = 'model = dict(type="Counting", step=3)\ntokenizer = dict(type="Letters")\n'


@TOKENIZERS.register_module()
class Letters:
    """A tokenizer for lowercase letters."""

    def encode(self, text: str) -> Sequence[int]:
        """Return the positions of the letters in the alphabet."""
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the letters."""
        return "".join(chr(token + ord("a")) for token in tokens)


@TOKENIZERS.register_module()
class Mute:
    """A class that is not a tokenizer."""


@MODELS.register_module()
class Counting(BaseModel):
    """A model that continues with the next letter, or with a random one if it samples."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(float(step)))

    def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
        """Do nothing; ``generate`` does not call it."""

    def generate(
        self, tokens: Tensor, *, max_new_tokens: int, do_sample: bool, temperature: float, top_k: int
    ) -> Tensor:
        """Return the tokens and the generated ones."""
        assert not self.training
        for _ in range(max_new_tokens):
            drawn = torch.randint(top_k, (1, 1)) if do_sample else (tokens[:, -1:] + int(self.step)) % 26
            tokens = torch.cat([tokens, drawn], dim=1)
        return tokens


@pytest.fixture
def written(tmp_path: Path) -> tuple[str, str]:
    """The path of a configuration, and the folder of a run with one checkpoint, whose model has a step of 1."""
    config = tmp_path / "letters.py"
    config.write_text(CONFIG, encoding="utf-8")
    strategy = SingleDeviceStrategy(work_dir=tmp_path / "run", log_kwargs={"log_level": "ERROR"})
    strategy.prepare(Counting(1))
    strategy.save_checkpoint(tmp_path / "run" / "iter_1")
    strategy.close()
    return str(config), str(tmp_path / "run")


@pytest.mark.slow
def test_a_model_uses_the_weights_of_the_checkpoint(stratagem: Command, written: tuple[str, str]) -> None:
    """The model uses the weights of the given checkpoint, or of the latest in a run folder."""
    config, run = written
    for checkpoint in (run, f"{run}/iter_1"):
        done = stratagem("sample", config, checkpoint, "--prompt", "ab", "--tokens", "4", "--temperature", "0")
        assert (done.status, done.out) == (0, "abcdef\n")


@pytest.mark.slow
def test_options_of_the_training_strategy_are_ignored(stratagem: Command, written: tuple[str, str]) -> None:
    """Options of the training strategy, which a command after sharded training contains, are ignored."""
    config, run = written
    done = stratagem(
        "sample", config, run, "--prompt", "a", "--tokens", "2", "--temperature", "0", "--set", "strategy.tp=2"
    )
    assert done.status == 0, done.err
    assert done.out.strip() == "abc"


def test_the_seed_determines_the_samples(stratagem: Command, written: tuple[str, str], tmp_path: Path) -> None:
    """The seed determines the samples, and no files are written."""
    before = sorted(tmp_path.rglob("*"))
    torch.manual_seed(4)
    expected = "".join("abcde"[int(torch.randint(5, (1, 1)))] for _ in range(8))
    done = stratagem("sample", *written, "--prompt", "z", "--tokens", "8", "--top-k", "5", "--seed", "4")
    assert done.out == f"z{expected}\n"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "letters.py has no tokenizer. Register a class"),
        ({"tokenizer": {"type": "Mute"}}, "tokenizer: Mute is not a tokenizer"),
        ({"model": {"type": "SupervisedModel", "network": {"type": "ReLU"}, "loss": {"type": "MSELoss"}}}, (
            "SupervisedModel cannot generate text: it has no method generate(tokens, *, max_new_tokens, do_sample,"
        )),
        ({"model": None}, "letters.py has no model"),
        ({"tokeniser": {"type": "Letters"}}, "'tokenizer'"),
    ],
    ids=["no tokenizer", "no methods", "no text", "no model", "misspelled"],
)  # fmt: skip
def test_a_model_that_cannot_generate_is_rejected(
    stratagem: Command, written: tuple[str, str], changes: dict[str, Any], message: str
) -> None:
    """The error for a model or tokenizer that cannot generate text states what is missing."""
    config, run = written
    Path(config).write_text(
        CONFIG + "".join(f"{key} = {value!r}\n" for key, value in changes.items()), encoding="utf-8"
    )
    done = stratagem("sample", config, run, "--prompt", "a")
    assert done.status == 2
    assert message in done.err
    assert done.out == ""


@pytest.mark.slow
def test_an_empty_prompt_and_a_missing_checkpoint_are_rejected(
    stratagem: Command, written: tuple[str, str], tmp_path: Path
) -> None:
    """A prompt without tokens and a missing checkpoint raise errors."""
    config, run = written
    empty = stratagem("sample", config, run, "--prompt", "")
    assert (empty.status, "--prompt '' has no tokens" in empty.err) == (2, True)
    missing = stratagem("sample", config, f"{run}/iter_2", "--prompt", "a")
    assert (missing.status, "iter_2: there is no such checkpoint" in missing.err) == (2, True)
    (tmp_path / "other").mkdir()
    other = stratagem("sample", config, tmp_path / "other", "--prompt", "a")
    assert (other.status, str(tmp_path / "other") in other.err) == (2, True)


@pytest.mark.slow
def test_a_training_ends_with_the_command_to_sample(stratagem: Command, config: str) -> None:
    """If the configuration has a tokenizer, the summary after training contains the command to generate text."""
    changes = ("--set", "train_cfg.max_epochs=1", "--set", "tokenizer.type=Letters")
    done = stratagem("train", config, "--work-dir", "run", *changes)
    rows = dict(line.strip().split(maxsplit=1) for line in done.out.splitlines() if line.startswith("  "))
    assert rows["sample"] == f"stratagem sample {config} run/epoch_1 {' '.join(changes)} --prompt TEXT"
