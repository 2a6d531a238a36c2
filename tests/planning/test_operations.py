"""The floating-point operations of a step."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from stratagem.planning.trace import StepTrace


def test_attention_on_the_cpu_is_counted_as_on_gpus() -> None:
    """Attention of 2 samples with 4 heads, 8 tokens and 16 features has 2 products of matrices, and 5 in the backward pass.

    Each has 2 x 2 x 4 x 8 x 8 x 16 = 16,384 operations. Torch counts none of them on the CPU.
    """
    query, key, value = (torch.rand(2, 4, 8, 16, requires_grad=True) for _ in range(3))
    with StepTrace({}) as trace:
        scaled_dot_product_attention(query, key, value).sum().backward()
    assert trace.flops == 7 * 16_384
    assert trace.flops_by_dtype == {"float32": trace.flops}
