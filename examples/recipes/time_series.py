"""Time series of different lengths (Japanese Vowels), and samples with weights: a recurrent network from aeon's data."""

import torch
from aeon.datasets import load_japanese_vowels
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import Dataset

from stratagem import BaseModel, Runner


class Utterances(Dataset):
    """12 coefficients over time, and which of nine speakers it is."""

    def __init__(self, split: str) -> None:
        series, labels = load_japanese_vowels(split)
        self.series = [torch.tensor(each.T, dtype=torch.float32) for each in series]
        self.labels = [int(label) - 1 for label in labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.series[index], self.labels[index]

    def lengths(self) -> list[int]:
        return [len(each) for each in self.series]


def collate(samples):
    series, labels = zip(*samples, strict=True)
    lengths = [len(each) for each in series]  # a list stays in the memory of the host, as pack_padded_sequence requires
    return dict(series=pad_sequence(series, batch_first=True), lengths=lengths, labels=torch.tensor(labels))


class Speakers(BaseModel):
    """A GRU on packed sequences. Long utterances count more: the loss is weighted by their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(12, 32, batch_first=True)
        self.classifier = nn.Linear(32, 9)

    def forward(self, series, lengths, labels, mode="tensor"):
        packed = pack_padded_sequence(series, lengths, batch_first=True, enforce_sorted=False)
        scores = self.classifier(self.recurrent(packed)[1][-1])
        if mode != "loss":
            return {"preds": scores, "target": labels}
        weights = torch.tensor(lengths, dtype=torch.float32, device=scores.device)
        losses = nn.functional.cross_entropy(scores, labels, reduction="none")
        # With the weight of the batch, accumulation and several ranks give the mean over all time steps.
        return {"loss": (losses * weights).sum() / weights.sum(), "weight": weights.sum()}


if __name__ == "__main__":
    training, test = Utterances("train"), Utterances("test")
    torch.manual_seed(0)  # for the initial weights
    runner = Runner(
        model=Speakers(),
        work_dir="work_dirs/time_series",
        # Batches of similar lengths have little padding.
        train_dataloader=dict(
            dataset=training,
            batch_size=16,
            batch_sampler=dict(type="GroupedBatchSampler", groups="lengths", bounds=[13, 17]),
            collate_fn=collate,
        ),
        train_cfg=dict(max_epochs=20, val_interval=20),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=5e-3), accumulative_counts=2),
        val_dataloader=dict(dataset=test, batch_size=74, collate_fn=collate),
        val_cfg=dict(),
        val_evaluator=dict(type="MulticlassAccuracy", num_classes=9, average="micro"),
        randomness=dict(seed=0),
    )
    runner.train()
    runner.close()
    print(f"lengths: {min(training.lengths())} to {max(training.lengths())}")
    print(f"accuracy: {runner.run.metrics['multiclassaccuracy']:.2f}")
