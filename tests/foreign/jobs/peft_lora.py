"""LoRA on a frozen BERT: only the adapters and the classifier are trained."""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from stratagem import ModelWithLoss, Runner
from tests.foreign.job import ByHand, Job
from tests.foreign.jobs import transformers_bert

BATCH = 16


def network():
    base = transformers_bert.network()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], modules_to_save=["classifier"])
    with warnings.catch_warnings():
        # peft reads an attribute that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(base, config)


def optimizer(model):
    return torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)


def loader(samples, batch_size) -> DataLoader:
    return transformers_bert.loader(samples, batch_size)


def train(batch_size, **options):
    model = network()
    runner = Runner(
        model=ModelWithLoss(model),
        train_dataloader=loader(transformers_bert.data(0)[:96], batch_size),
        optim_wrapper=optimizer(model),
        train_cfg=dict(max_epochs=2),
        val_dataloader=loader(transformers_bert.data(12), 32),
        val_cfg=dict(),
        val_evaluator=MulticlassAccuracy(3, average="micro"),
        **options,
    )
    runner.train()
    return runner, model


def by_hand(record: ByHand):
    model = network()
    optim = optimizer(model)
    for _ in range(2):
        model.train()
        for batch in loader(transformers_bert.data(0)[:96], BATCH):
            record.samples(batch)
            model(**batch).loss.backward()
            optim.step()
            optim.zero_grad()
        model.eval()
        accuracy = MulticlassAccuracy(3, average="micro")
        with torch.no_grad():
            for batch in loader(transformers_bert.data(12), 32):
                accuracy.update(model(**batch).logits, batch["labels"])
        record.metrics(multiclassaccuracy=accuracy.compute())
    return model


JOB = Job(
    packages=("peft", "transformers", "torchmetrics"),
    summary="LoRA adapters and a new classifier on a frozen BERT",
    train=train,
    by_hand=by_hand,
    batch=BATCH,
    tolerance=1e-5,
)
