"""The language model example trains on real text, with the same result under every strategy, and generates text."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import Config, Runner
from stratagem.cli.main import main
from stratagem.errors import ConfigValueError
from stratagem.model import BaseModel
from stratagem.registry import DATASETS, FUNCTIONS, MODELS, TOKENIZERS
from stratagem.strategies.setup.building import build_optim_wrapper
from stratagem.train import Hook
from tests.support.ranks import Ranks

CONFIG = Path(__file__).parents[1] / "examples" / "gpt" / "config.py"
SMALL = {"model.width": 64, "model.blocks": 2, "log_level": "ERROR", "train_cfg.val_interval": 1000}


def config(**changes: Any) -> Config:
    """Return the example's configuration with a small model."""
    read = Config.fromfile(CONFIG)
    read.merge_from_dict({**SMALL, **changes})
    return read


def text(*, held_out: bool) -> str:
    """Return the text of the dataset, with paragraphs separated by line breaks."""
    sequences = DATASETS.build(config().train_dataloader.dataset | {"held_out": held_out}).sequences
    decode = TOKENIZERS.build(config().tokenizer).decode
    # Each sequence starts with the last token of the previous one; only the first of a paragraph starts with a line
    # break.
    rows = [decode(sequence.tolist()) for sequence in sequences]
    return "".join(row if row[0] == "\n" else row[1:] for row in rows)


@pytest.fixture
def model() -> BaseModel:
    """A small model with larger random weights, so that its logits differ clearly."""
    built = MODELS.build(config().model)
    torch.manual_seed(3)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


class Losses(Hook):
    """A hook that records the loss and the number of targets of each iteration."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, int]] = []

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Record the loss and the number of targets."""
        self.rows.append((outputs["loss"].item(), int((data_batch["targets"] >= 0).sum())))


def train(folder: str, **changes: Any) -> tuple[list[tuple[float, int]], dict[str, float]]:
    """Train; return the loss and the number of targets of each iteration on this rank, and the validation metrics."""
    losses = Losses()
    changed = config(**{"work_dir": folder, "custom_hooks": [losses], **changes})
    runner = Runner.from_cfg(changed)
    runner.train()
    metrics = {name: value for name, value in runner.run.metrics.items() if isinstance(value, float)}
    runner.close()
    return losses.rows, metrics


@pytest.mark.slow
def test_the_whole_text_is_read() -> None:
    """The dataset contains every character from the first verse to the last, split by paragraph."""
    learned, held_out = text(held_out=False), text(held_out=True)
    assert learned.startswith("\nIn the beginning God created the heaven and the earth. And the earth was without form")
    assert learned.endswith("The grace of our Lord Jesus Christ be with you all. Amen.\n")
    paragraphs = [learned.strip("\n").split("\n\n"), held_out.strip("\n").split("\n\n")]
    assert [len(each) for each in paragraphs] == [4519, 116]
    assert not set(paragraphs[0]) & set(paragraphs[1])


def test_a_prompt_with_an_unknown_character_is_rejected() -> None:
    """The error for an unknown character contains the character and the alphabet."""
    tokenizer = TOKENIZERS.build(config().tokenizer)
    assert tokenizer.decode(tokenizer.encode("Æneas, arise!")) == "Æneas, arise!"
    with pytest.raises(ConfigValueError, match="contains no '4', so the model has no token for it"):
        tokenizer.encode("Psalm 4?")


def test_short_sequences_are_padded_without_targets() -> None:
    """Inputs omit the last token and targets the first; short sequences are padded with targets of -100."""
    config()
    batch = FUNCTIONS.get("pad_sequences")([torch.tensor([5, 6, 7, 8]), torch.tensor([9, 3])])
    assert batch["tokens"].tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch["targets"].tolist() == [[6, 7, 8], [3, -100, -100]]


def test_attention_is_causal(model: BaseModel) -> None:
    """Attention is causal: changing the last token only changes the last logits."""
    tokens = torch.randint(67, (2, 20))
    other = tokens.clone()
    other[:, -1] = (tokens[:, -1] + 1) % 67
    before, after = model(tokens), model(other)
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_the_loss_is_the_mean_over_the_targets(model: BaseModel) -> None:
    """Padding is ignored by the loss and its weight, and the validation losses have the same sum."""
    tokens, targets = torch.randint(67, (2, 5)), torch.randint(67, (2, 5))
    targets[1, 2:] = -100
    outputs = model(tokens, targets, mode="loss")
    chances = model(tokens).log_softmax(-1)
    expected = [-chances[row, place, targets[row, place]] for row, count in ((0, 5), (1, 2)) for place in range(count)]
    assert outputs["weight"] == 7
    torch.testing.assert_close(outputs["loss"], sum(expected) / 7)
    by_sample = model(tokens, targets, mode="predict")
    assert by_sample["counts"].tolist() == [5, 2]
    torch.testing.assert_close(by_sample["losses"].sum() / 7, outputs["loss"])


def test_only_matrices_have_weight_decay_and_the_embedding_is_tied() -> None:
    """Only the 4 matrices of each of the 2 blocks have weight decay; the embedding is tied to the output layer."""
    model = MODELS.build(config().model)
    assert model.lm_head.weight is model.token_embedding.weight
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optim_wrapper(config().optim_wrapper, model).optimizer.param_groups
    decayed = [names[id(each)] for group in groups if group["weight_decay"] for each in group["params"]]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    matrices = ("qkv", "attention_out", "mlp_in", "mlp_out")
    assert sorted(decayed) == sorted(f"blocks.{block}.{matrix}.weight" for block in range(2) for matrix in matrices)


def options(max_new_tokens: int, **changes: Any) -> dict[str, Any]:
    """Return the arguments of ``generate``."""
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": 1.0, "top_k": 0, **changes}


def test_muon_updates_the_matrices_of_the_blocks() -> None:
    """In ``muon.py``, the four matrices of each block belong to Muon, and the tied embedding and all others to AdamW."""
    read = Config.fromfile(CONFIG.with_name("muon.py"))
    read.merge_from_dict(SMALL)
    built = MODELS.build(read.model)
    optimizer = build_optim_wrapper(read.optim_wrapper, built).optimizer
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    muon, adamw = ([names[id(each)] for each in group["params"]] for group in optimizer.param_groups)
    layers = ("qkv", "attention_out", "mlp_in", "mlp_out")
    assert muon == [f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers]
    assert adamw[:2] == ["token_embedding.weight", "position_embedding.weight"]
    assert len(muon) + len(adamw) == len(names)
    assert all("blocks." not in name or name.endswith(".bias") or "_norm." in name for name in adamw)


def test_greedy_decoding(model: BaseModel) -> None:
    """Greedy decoding and ``top_k=1`` return the most likely tokens, even beyond the context length."""
    prompt = torch.randint(67, (2, 126))
    greedy = model.generate(prompt, **options(6, do_sample=False))
    assert greedy.shape == (2, 132)
    assert torch.equal(greedy[:, :126], prompt)
    for place in range(126, 132):
        assert torch.equal(greedy[:, place], model(greedy[:, max(0, place - 128) : place])[:, -1].argmax(-1))
    assert torch.equal(model.generate(prompt, **options(6, top_k=1)), greedy)


@pytest.mark.slow
def test_samples_follow_the_temperature(model: BaseModel) -> None:
    """4,000 samples with ``top_k=3`` and temperature 0.5 match the probabilities within 4 standard deviations."""
    prompt = torch.randint(67, (1, 4))
    likeliest, numbers = model(prompt)[0, -1].topk(3)
    chances = (likeliest / 0.5).softmax(0)
    drawn = model.generate(prompt.expand(4000, 4), **options(1, temperature=0.5, top_k=3))[:, -1]
    shares = torch.stack([(drawn == number).float().mean() for number in numbers])
    assert shares.sum() == 1
    deviation = (chances * (1 - chances) / 4000).sqrt()
    assert ((shares - chances).abs() <= 4 * deviation + 1e-6).all()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The folder of a short training run, and its validation metrics."""
    folder = tmp_path_factory.mktemp("gpt")
    changes = {"train_cfg.max_iters": 60, "param_scheduler.0.end": 10, "param_scheduler.1.begin": 10}
    _, metrics = train(str(folder), **changes, **{"optim_wrapper.optimizer.lr": 0.01})
    return folder, metrics


@pytest.mark.slow
def test_the_model_is_better_than_character_frequencies(learned: tuple[Path, dict[str, float]]) -> None:
    """The validation loss is below the entropy of the held-out character frequencies, about 3 nats."""
    text_there = text(held_out=True)
    shares = [count / len(text_there) for count in Counter(text_there).values()]
    entropy = -sum(share * math.log(share) for share in shares)
    _, metrics = learned
    assert metrics["loss"] < entropy - 0.2
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["bits_per_token"] == pytest.approx(metrics["loss"] / math.log(2))


@pytest.mark.slow
def test_a_checkpoint_generates_text(
    learned: tuple[Path, dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    """`stratagem sample` continues the prompt, reproducibly, and differently with a different seed."""
    folder, _ = learned

    def sample(*words: str) -> str:
        words = ("sample", str(CONFIG), str(folder), "--prompt", "In the beginning", "--tokens", "40", *words)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([*words, "--set", "model.width=64", "--set", "model.blocks=2"])
        assert end.value.code == 0
        return capsys.readouterr().out

    written = sample()
    assert written.startswith("In the beginning")
    assert len(written) == len("In the beginning") + 40 + len("\n")
    assert sample() == written
    assert sample("--seed", "1") != written
    assert sample("--temperature", "0") == sample("--top-k", "1", "--seed", "5")


def test_strategies_give_the_same_losses(ranks: Ranks, tmp_path: Path) -> None:
    """One process with 8 samples and two with 4 each under DDP and FSDP have the same loss in each iteration."""
    short = {"train_cfg.max_iters": 6, "param_scheduler.0.end": 2, "param_scheduler.1.begin": 2}
    single, measured = train(str(tmp_path / "single"), **short, **{"train_dataloader.batch_size": 8})
    for strategy in ("DDPStrategy", "FSDPStrategy"):
        changes = {**short, "train_dataloader.batch_size": 4, "strategy": strategy}
        (first, there), (second, _) = ranks.run(train, str(tmp_path / strategy), **changes)
        # Otherwise the weights of the micro-batches would have no effect.
        assert [count for _, count in first] != [count for _, count in second]
        for (loss, count), (a, of_a), (b, of_b) in zip(single, first, second, strict=True):
            assert of_a + of_b == count
            assert (a * of_a + b * of_b) / count == pytest.approx(loss, abs=1e-5)
        assert there == pytest.approx(measured, abs=1e-4)
