"""A hook, a metric and a sampler of your own."""

import torch
from data import digits
from torch import nn
from torch.utils.data import DataLoader

from stratagem import BaseMetric, Hook, Runner, SupervisedModel
from stratagem.data import PositionedSampler


class WeightNorms(Hook):
    """Logs the norm of each weight matrix every ``interval`` iterations."""

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval

    def after_train_iter(self, run, batch_idx, data_batch=None, outputs=None):
        if self.every_n_train_iters(run, self.interval):
            network = run.strategy.unwrap_model()
            norms = {
                f"norm/{name}": float(weight.detach().norm())
                for name, weight in network.named_parameters()
                if weight.ndim > 1
            }
            run.record(norms)


class WorstClass(BaseMetric):
    """The accuracy of the class with the lowest accuracy, and which class it is."""

    def process(self, data_batch, data_samples):
        labels = data_batch[1]
        right = data_samples["preds"].argmax(dim=1) == labels
        self.results += list(zip(labels.tolist(), right.tolist(), strict=True))

    def compute_metrics(self, results):
        # All samples of all ranks, each once; called on rank 0.
        labels, right = torch.tensor(results).unbind(dim=1)
        accuracies = {int(each): float(right[labels == each].float().mean()) for each in labels.unique()}
        worst = min(accuracies, key=accuracies.get)
        return {"worst_accuracy": accuracies[worst], "worst_class": float(worst)}


class ByLabel(PositionedSampler):
    """Alternates between the classes: 0, 1, 2, ..., 9, 0, 1, ...; resumes at any sample, with any number of ranks."""

    def __init__(self, labels: torch.Tensor, seed: int = 0, **ranks) -> None:
        super().__init__(**ranks)
        self.labels, self.seed = labels, seed

    @property
    def samples(self) -> int:
        return len(self.labels)

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        shuffled = torch.randperm(len(self.labels), generator=generator)
        of_class = [shuffled[self.labels[shuffled] == each].tolist() for each in self.labels.unique()]
        longest = max(map(len, of_class))
        return [indices[row] for row in range(longest) for indices in of_class if row < len(indices)]


if __name__ == "__main__":
    training, validation = digits(), digits(start=3, step=20)
    torch.manual_seed(0)  # for the initial weights
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    runner = Runner(
        model=SupervisedModel(network, nn.CrossEntropyLoss()),
        work_dir="work_dirs/custom_parts",
        train_dataloader=DataLoader(training, batch_size=50, sampler=ByLabel(training.tensors[1])),
        train_cfg=dict(max_epochs=3),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=3e-3)),
        val_dataloader=DataLoader(validation, batch_size=125),
        val_cfg=dict(),
        val_evaluator=WorstClass(),
        custom_hooks=[WeightNorms()],
        default_hooks=dict(checkpoint=None),
        randomness=dict(seed=0),
    )
    runner.train()
    runner.close()
    first = training.tensors[1][ByLabel(training.tensors[1]).order(0)[:10]]
    print(f"the first labels: {first.tolist()}")
    print(f"worst accuracy: {runner.run.metrics['worst_accuracy']:.2f}")
