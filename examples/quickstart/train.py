import torch
from points import Points
from torch.utils.data import DataLoader

from stratagem import Runner, SupervisedModel


def train(epochs: int, *, resume: bool) -> Runner:
    torch.manual_seed(0)  # for the initial weights
    network = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    runner = Runner(
        model=SupervisedModel(network, torch.nn.CrossEntropyLoss()),
        work_dir="work_dirs/circle",
        train_dataloader=DataLoader(Points(1000, seed=0), batch_size=50, shuffle=True),
        optim_wrapper=torch.optim.AdamW(network.parameters(), lr=0.01),
        train_cfg=dict(max_epochs=epochs, val_interval=10),
        val_dataloader=DataLoader(Points(1000, seed=1), batch_size=500),
        val_cfg=dict(),  # required for validation, even without options
        val_evaluator=dict(type="Accuracy", task="multiclass", num_classes=2),
        default_hooks=dict(checkpoint=dict(interval=10)),
        randomness=dict(seed=0),
        resume=resume,
    )
    runner.train()
    runner.close()
    print(f"epoch {runner.run.epoch}: accuracy {runner.run.metrics['accuracy']:.2f}")
    return runner


if __name__ == "__main__":
    train(20, resume=False)
    train(30, resume=True)
