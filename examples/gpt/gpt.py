"""A small GPT-2-style language model, and a metric that reports loss, perplexity and bits per token."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from stratagem.model import BaseModel
from stratagem.registry import METRICS, MODELS
from stratagem.train import BaseMetric


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention and an MLP, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.attention_norm = nn.LayerNorm(width)
        # No bias: a bias of the keys would cancel in the softmax.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # The features are ordered by head, so that with tensor parallelism each rank has complete heads.
        by_head = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, 3, self.head_width))
        queries, keys, values = by_head.transpose(1, 3).unbind(1)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(x))))


@MODELS.register_module()
class Gpt(BaseModel):
    """Predict the next token from up to ``length`` preceding tokens. The embedding and the output layer share their weight.

    The loss is the mean over all targets of a batch, and ``weight`` is their number, so that micro-batches and ranks are
    weighted by their number of tokens.
    """

    # The tensor-parallel plan, used by FSDPStrategy(tp=...).
    tp_plan: ClassVar = {
        "blocks.*.qkv": "colwise",
        "blocks.*.attention_out": "rowwise",
        "blocks.*.mlp_in": "colwise",
        "blocks.*.mlp_out": "rowwise",
    }

    def __init__(self, *, tokens: int, length: int, width: int = 256, blocks: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.length = length
        self.token_embedding = nn.Embedding(tokens, width)
        self.position_embedding = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, tokens, bias=False)
        self.lm_head.weight = self.token_embedding.weight

    def init_weights(self) -> None:
        """Initialize the weights as in GPT-2: scale down the output layers of the residual branches by the number of blocks."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                residual = name.endswith("_out.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, mode: str = "tensor") -> Any:
        """Return logits of shape [N, T, V]; with targets, return the loss of the batch or the summed losses per sample."""
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits
        losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        counts = (targets >= 0).sum(1)
        if mode == "loss":
            return {"loss": losses.sum() / counts.sum(), "weight": counts.sum()}
        return {"losses": losses.sum(1), "counts": counts}

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, *, max_new_tokens: int, do_sample: bool, temperature: float, top_k: int
    ) -> Tensor:
        """Append generated tokens to ``tokens`` of shape [N, T]; sample from the ``top_k`` most likely ones (0: from all)."""
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.length :])[:, -1]
            if not do_sample:
                next_token = logits.argmax(-1, keepdim=True)
            else:
                values, indices = (logits / temperature).topk(top_k or logits.shape[-1])
                next_token = indices.gather(1, values.softmax(-1).multinomial(1))
            tokens = torch.cat([tokens, next_token], dim=1)
        return tokens


@METRICS.register_module()
class TokenLoss(BaseMetric):
    """Compute the mean loss per token in nats, the perplexity, and the bits per token."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += zip(data_samples["losses"].tolist(), data_samples["counts"].tolist(), strict=True)

    def compute_metrics(self, results: list[tuple[float, int]]) -> dict[str, float]:
        loss = sum(loss for loss, _ in results) / sum(count for _, count in results)
        return {"loss": loss, "perplexity": math.exp(loss), "bits_per_token": loss / math.log(2)}
