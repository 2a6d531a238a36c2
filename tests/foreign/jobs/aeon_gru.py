"""A recurrent network on the Japanese Vowels dataset from aeon, with packed sequences of different lengths."""

import torch
from aeon.datasets import load_japanese_vowels
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from stratagem import BaseModel, Runner
from tests.foreign.job import ByHand, Job

BATCH = 30


class Speakers(nn.Module):
    """Predicts one of nine speakers from the 12 coefficients of an utterance."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(12, 16, batch_first=True)
        self.classifier = nn.Linear(16, 9)

    def forward(self, series, lengths):
        packed = pack_padded_sequence(series, lengths, batch_first=True, enforce_sorted=False)
        return self.classifier(self.recurrent(packed)[1][-1])


class Classifier(BaseModel):
    """The network and its loss."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, series, lengths, labels, mode="tensor"):
        scores = self.network(series, lengths)
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(scores, labels)}
        return {"preds": scores, "target": labels}


def data(split):
    series, labels = load_japanese_vowels(split)
    every = 1 if split == "train" else 3
    return [
        (torch.tensor(each.T, dtype=torch.float32), int(label) - 1)
        for each, label in list(zip(series, labels, strict=True))[::every]
    ]


def collate(samples):
    series, labels = zip(*samples, strict=True)
    return pad_sequence(series, batch_first=True), torch.tensor([len(each) for each in series]), torch.tensor(labels)


def training(batch_size):
    return DataLoader(
        data("train"), batch_size, shuffle=True, generator=torch.Generator().manual_seed(1), collate_fn=collate
    )


def network():
    torch.manual_seed(0)
    return Speakers()


def train(batch_size, **options):
    model = network()
    runner = Runner(
        model=Classifier(model),
        train_dataloader=training(batch_size),
        optim_wrapper=torch.optim.RMSprop(model.parameters(), lr=5e-3),
        train_cfg=dict(max_epochs=2),
        val_dataloader=DataLoader(data("test"), 50, collate_fn=collate),
        val_cfg=dict(),
        val_evaluator=dict(type="MulticlassAccuracy", num_classes=9, average="micro"),
        **options,
    )
    runner.train()
    return runner, model


def by_hand(record: ByHand):
    model = network()
    optim = torch.optim.RMSprop(model.parameters(), lr=5e-3)
    loader = training(BATCH)
    for _ in range(2):
        for series, lengths, labels in loader:
            record.samples((series, lengths, labels))
            nn.functional.cross_entropy(model(series, lengths), labels).backward()
            optim.step()
            optim.zero_grad()
        accuracy = MulticlassAccuracy(9, average="micro")
        with torch.no_grad():
            for series, lengths, labels in DataLoader(data("test"), 50, collate_fn=collate):
                accuracy.update(model(series, lengths), labels)
        record.metrics(multiclassaccuracy=accuracy.compute())
    return model


JOB = Job(
    packages=("aeon", "torchmetrics"),
    summary="a GRU on packed time series of different lengths (Japanese Vowels)",
    train=train,
    by_hand=by_hand,
    batch=BATCH,
    tolerance=1e-5,
)
