"""A Hugging Face stream that is shuffled again in every epoch."""

import torch
from datasets import Dataset
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import scale
from torch import nn
from torch.utils.data import DataLoader

from stratagem import BaseMetric, BaseModel, Runner
from tests.foreign.job import ByHand, Job

BATCH = 32


class Tumors(BaseModel):
    """Logistic regression with a hidden layer; batches are mappings."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, features, malignant, mode="tensor"):
        scores = self.network(features).squeeze(1)
        if mode == "loss":
            return {"loss": nn.functional.binary_cross_entropy_with_logits(scores, malignant)}
        return {"scores": scores, "malignant": malignant}


class Auc(BaseMetric):
    """The area under the curve, computed by scikit-learn from the scores of all ranks."""

    def process(self, data_batch, data_samples):
        self.results += zip(data_samples["scores"].tolist(), data_samples["malignant"].tolist(), strict=True)

    def compute_metrics(self, results):
        scores, malignant = zip(*results, strict=True)
        return {"auc": roc_auc_score(malignant, scores), "count": len(results)}


def data():
    features, labels = load_breast_cancer(return_X_y=True)
    table = Dataset.from_dict({"features": scale(features).tolist(), "malignant": (labels == 0).astype(float).tolist()})
    table = table.with_format("torch")
    return table.select(range(320)), table.select(range(320, 569))


def stream(table):
    return table.to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=64)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 16), nn.SiLU(), nn.Linear(16, 1))


def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def train(batch_size, **options):
    training, validation = data()
    model = network()
    runner = Runner(
        model=Tumors(model),
        train_dataloader=DataLoader(stream(training), batch_size),
        optim_wrapper=optimizer(model),
        train_cfg=dict(max_epochs=3),
        val_dataloader=DataLoader(validation, 100),
        val_cfg=dict(),
        val_evaluator=Auc(),
        **options,
    )
    runner.train()
    return runner, model


def by_hand(record: ByHand):
    training, validation = data()
    samples, model = stream(training), network()
    loss = nn.BCEWithLogitsLoss()
    optim = optimizer(model)
    for epoch in range(3):
        samples.set_epoch(epoch)
        for batch in DataLoader(samples, BATCH):
            record.samples(batch)
            loss(model(batch["features"]).squeeze(1), batch["malignant"]).backward()
            optim.step()
            optim.zero_grad()
        with torch.no_grad():
            scores = model(validation[:]["features"]).squeeze(1)
        record.metrics(auc=roc_auc_score(validation[:]["malignant"], scores), count=len(scores))
    return model


JOB = Job(
    packages=("datasets", "scikit-learn"),
    summary="a shuffled `IterableDataset` with `set_epoch`, and `roc_auc_score` from scikit-learn as a user-defined metric",
    train=train,
    by_hand=by_hand,
    batch=BATCH,
    tolerance=1e-5,
    metric_tolerance=1e-4,
)
