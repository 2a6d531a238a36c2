"""A hand-written training loop, and the same training with Stratagem."""

from pathlib import Path

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from examples.migration.shared import loaders, network
from stratagem import Runner, SupervisedModel


# docs: begin before
def before(losses):
    train_loader, val_loader = loaders()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    total = 2 * len(train_loader) // 2  # optimizer steps: 2 epochs, 2 batches per step
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    best = 0.0
    for epoch in range(2):
        model.train()
        for index, (images, labels) in enumerate(train_loader):
            loss = nn.functional.cross_entropy(model(images), labels)
            (loss / 2).backward()
            losses.append(loss.item())
            if (index + 1) % 2 == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        model.eval()
        accuracy = MulticlassAccuracy(10, average="micro")
        with torch.no_grad():
            for images, labels in val_loader:
                accuracy.update(model(images), labels)
        value = accuracy.compute().item()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        torch.save(state, "last.pth")
        if value > best:
            best = value
            torch.save(state, "best.pth")
    return best


# docs: end before


# docs: begin after
def after(*hooks):
    train_loader, val_loader = loaders()
    model = network()
    runner = Runner(
        model=SupervisedModel(model, nn.CrossEntropyLoss()),
        work_dir="work_dirs/from_a_loop",
        train_dataloader=train_loader,
        train_cfg=dict(max_epochs=2),
        optim_wrapper=dict(
            optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01),
            accumulative_counts=2,
            clip_grad=dict(max_norm=1.0),
        ),
        param_scheduler=dict(type="CosineAnnealingLR", by="step"),
        val_dataloader=val_loader,
        val_cfg=dict(),
        val_evaluator=MulticlassAccuracy(10, average="micro"),
        default_hooks=dict(checkpoint=dict(interval=1, save_best="multiclassaccuracy", max_keep_ckpts=1)),
        custom_hooks=hooks,
    )
    runner.train()
    runner.close()
    return runner.run.metrics["multiclassaccuracy"]


# docs: end after


if __name__ == "__main__":
    print(f"before: {before([]):.3f}, after: {after():.3f}")
    print(f"checkpoints: {sorted(path.name for path in Path('work_dirs/from_a_loop').glob('*epoch*'))}")
