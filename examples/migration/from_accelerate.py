"""A loop with Accelerate, and the same training with Stratagem."""

import torch
from accelerate import Accelerator
from torch import nn

from examples.migration.shared import loaders, network
from stratagem import Runner, SupervisedModel


# docs: begin before
def before(losses):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    train_loader, _ = loaders()
    inner = network()
    optimizer = torch.optim.AdamW(inner.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, end_factor=1.0, total_iters=5)
    model, optimizer, train_loader, scheduler = accelerator.prepare(inner, optimizer, train_loader, scheduler)
    for epoch in range(2):
        model.train()
        for images, labels in train_loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                losses.append(loss.item())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.save_state(f"accelerate/epoch_{epoch}")
    return inner


# docs: end before


# docs: begin after
def after(*hooks):
    train_loader, _ = loaders()
    model = network()
    runner = Runner(
        model=SupervisedModel(model, nn.CrossEntropyLoss()),
        work_dir="work_dirs/from_accelerate",
        train_dataloader=train_loader,
        train_cfg=dict(max_epochs=2),
        optim_wrapper=dict(
            optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3),
            accumulative_counts=2,
            clip_grad=dict(max_norm=1.0),
        ),
        # total_iters=5 of torch is a range of 6 positions, the first with the factor 0.1 and the last with 1.
        param_scheduler=dict(type="LinearLR", start_factor=0.1, begin=0, end=6, by="step"),
        custom_hooks=hooks,
    )
    runner.train()
    runner.close()
    return model


# docs: end after
