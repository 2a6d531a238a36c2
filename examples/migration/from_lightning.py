"""A LightningModule and its Trainer, and the same training with Stratagem."""

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from examples.migration.shared import loaders, network
from stratagem import BaseModel, Runner


# docs: begin before
class LitClassifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network()
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.losses = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.accuracy.update(self.network(images), labels)
        self.log("acc", self.accuracy)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return [optimizer], [scheduler]


def before():
    train_loader, val_loader = loaders()
    module = LitClassifier()
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        callbacks=[
            ModelCheckpoint(monitor="acc", mode="max"),
            EarlyStopping(monitor="acc", mode="max", patience=2),
        ],
        num_sanity_val_steps=0,
        default_root_dir="lightning",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train_loader, val_loader)
    return module.losses, trainer.callback_metrics["acc"].item()


# docs: end before


# docs: begin after
class Classifier(BaseModel):
    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, images, labels, mode="tensor"):
        scores = self.network(images)
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(scores, labels)}
        return {"preds": scores, "target": labels}


def after(*hooks):
    train_loader, val_loader = loaders()
    runner = Runner(
        model=Classifier(),
        work_dir="work_dirs/from_lightning",
        train_dataloader=train_loader,
        train_cfg=dict(max_epochs=3),
        optim_wrapper=dict(
            optimizer=dict(type="SGD", lr=0.1, momentum=0.9),
            accumulative_counts=2,
            clip_grad=dict(max_norm=1.0),
        ),
        param_scheduler=dict(type="StepLR", step_size=1, gamma=0.5),
        val_dataloader=val_loader,
        val_cfg=dict(),
        val_evaluator=dict(acc=MulticlassAccuracy(10, average="micro")),
        default_hooks=dict(checkpoint=dict(interval=1, save_best="acc")),
        custom_hooks=[dict(type="EarlyStoppingHook", monitor="acc", patience=2, min_delta=0.0), *hooks],
    )
    runner.train()
    runner.close()
    return runner.run.metrics["acc"]


# docs: end after
