"""A small GPT-2 with tied embeddings, on a tokenized Hugging Face dataset."""

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from torchmetrics import Metric
from transformers import DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel

from stratagem import ModelWithLoss, Runner
from tests.foreign.bible import paragraphs, tokenizer
from tests.foreign.job import ByHand, Job

BATCH, LENGTH = 16, 32


class Perplexity(Metric):
    """The perplexity of the next tokens."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds, target):
        losses = torch.nn.functional.cross_entropy(
            preds[:, :-1].flatten(0, 1), target[:, 1:].flatten(), reduction="none"
        )
        self.total += losses.sum(dtype=torch.float64)
        self.count += losses.numel()

    def compute(self):
        return (self.total / self.count).exp()


def data(start, count):
    """Return ``count`` blocks of tokens from consecutive paragraphs."""

    def blocks(rows):
        tokens = [token for ids in tokenizer()(rows["text"], add_special_tokens=False)["input_ids"] for token in ids]
        ends = range(LENGTH, len(tokens), LENGTH)
        return {"input_ids": [tokens[end - LENGTH : end] for end in ends]}

    texts = Dataset.from_dict({"text": paragraphs()[start : start + 200]})
    return texts.map(blocks, batched=True, batch_size=200, remove_columns=["text"]).select(range(count))


def loader(samples, batch_size):
    return DataLoader(samples, batch_size, collate_fn=DataCollatorForLanguageModeling(tokenizer(), mlm=False))


def network():
    torch.manual_seed(0)
    sizes = dict(
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=LENGTH,
        vocab_size=len(tokenizer()),
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))


def train(batch_size, *, strategy, **options):
    model = network()
    if strategy == "FSDPStrategy":
        strategy = dict(type=strategy, wrap_policy="GPT2Block")
    runner = Runner(
        model=ModelWithLoss(model),
        train_dataloader=loader(data(0, 160).shuffle(seed=1), batch_size),
        optim_wrapper=torch.optim.AdamW(model.parameters(), lr=2e-3),
        train_cfg=dict(max_epochs=2),
        val_dataloader=loader(data(1000, 40), 16),
        val_cfg=dict(),
        val_evaluator=dict(type=Perplexity),
        strategy=strategy,
        **options,
    )
    runner.train()
    return runner, model


def by_hand(record: ByHand):
    model = network()
    optim = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(2):
        model.train()
        for batch in loader(data(0, 160).shuffle(seed=1), BATCH):
            record.samples(batch)
            model(**batch).loss.backward()
            optim.step()
            optim.zero_grad()
        model.eval()
        perplexity = Perplexity()
        with torch.no_grad():
            for batch in loader(data(1000, 40), 16):
                perplexity.update(model(**batch).logits, batch["labels"])
        record.metrics(perplexity=perplexity.compute())
    return model


JOB = Job(
    packages=("transformers", "datasets", "torchmetrics"),
    summary="a small GPT-2 with tied embeddings on a `Dataset` with `map`, `select` and `shuffle`; a user-defined metric",
    train=train,
    by_hand=by_hand,
    batch=BATCH,
    tolerance=1e-5,
    metric_tolerance=0.5,
)
