"""Two trainings that should be equal: their traces show the first difference and its cause."""

import torch
from torch import nn

import stratagem
from stratagem.trace import compare, read_trace


def train(path: str, clip: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with stratagem.trace.record(path, model):
        for _ in range(5):
            model(torch.randn(16, 8)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


train("before.json", clip=1.0)
train("after.json", clip=0.1)
first = compare(read_trace("before.json"), read_trace("after.json")).first
print(f"step {first.step}, part {first.part.value}")
