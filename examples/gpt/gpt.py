"""A small language model in the manner of GPT-2, and how well it foretells."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from stratagem.model import BaseModel
from stratagem.registry import METRICS, MODELS
from stratagem.train import BaseMetric


class Block(nn.Module):
    """Attention to earlier places, then a layer for each place by itself; both add to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.mix_norm = nn.LayerNorm(width)
        # No bias: what one adds to keys, softmax takes away again.
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.mix_out = nn.Linear(width, width)
        self.think_norm = nn.LayerNorm(width)
        self.think = nn.Linear(width, 4 * width)
        self.think_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # Head by head, so that ranks which share a layer's arithmetic have whole heads.
        by_head = self.queries_keys_values(self.mix_norm(x)).unflatten(-1, (-1, 3, self.head_width))
        queries, keys, values = by_head.transpose(1, 3).unbind(1)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.mix_out(mixed.transpose(1, 2).flatten(2))
        return x + self.think_out(functional.gelu(self.think(self.think_norm(x))))


@MODELS.register_module()
class Gpt(BaseModel):
    """Predicts the next token from at most ``length`` earlier ones. Embedding and output share their weight.

    Its loss is the mean over the batch's targets, and its weight their number: batches, ranks and accumulated
    micro-batches count by their tokens.
    """

    # How layers are spread by FSDPStrategy(tp=...).
    tp_plan: ClassVar = {
        "blocks.*.queries_keys_values": "colwise",
        "blocks.*.mix_out": "rowwise",
        "blocks.*.think": "colwise",
        "blocks.*.think_out": "rowwise",
    }

    def __init__(self, *, tokens: int, length: int, width: int = 256, blocks: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.length = length
        self.tokens = nn.Embedding(tokens, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, tokens, bias=False)
        self.scores.weight = self.tokens.weight

    def init_weights(self) -> None:
        """Draw the weights as GPT-2 does: what adds to the sum over all blocks begins smaller, the more there are."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                added = name.endswith("_out.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) if added else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, mode: str = "tensor") -> Any:
        """Return scores of shape [N, T, V] or, with ``mode``, the batch's loss or each sample's sum of losses."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        scores = self.scores(self.norm(x))
        if targets is None:
            return scores
        losses = functional.cross_entropy(scores.transpose(1, 2), targets, reduction="none")
        counts = (targets >= 0).sum(1)
        if mode == "loss":
            return {"loss": losses.sum() / counts.sum(), "weight": counts.sum()}
        return {"losses": losses.sum(1), "counts": counts}

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, *, max_new_tokens: int, do_sample: bool, temperature: float, top_k: int
    ) -> Tensor:
        """Return ``tokens``, of shape [N, T], with further ones drawn from the ``top_k`` likeliest (0: from all)."""
        for _ in range(max_new_tokens):
            scores = self(tokens[:, -self.length :])[:, -1]
            if not do_sample:
                following = scores.argmax(-1, keepdim=True)
            else:
                likeliest, numbers = (scores / temperature).topk(top_k or scores.shape[-1])
                following = numbers.gather(1, likeliest.softmax(-1).multinomial(1))
            tokens = torch.cat([tokens, following], dim=1)
        return tokens


@METRICS.register_module()
class TokenLoss(BaseMetric):
    """The mean loss of a token in nats, and what it means: perplexity, and bits per token."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += zip(data_samples["losses"].tolist(), data_samples["counts"].tolist(), strict=True)

    def compute_metrics(self, results: list[tuple[float, int]]) -> dict[str, float]:
        loss = sum(loss for loss, _ in results) / sum(count for _, count in results)
        return {"loss": loss, "perplexity": math.exp(loss), "bits_per_token": loss / math.log(2)}
