"""Protocols for text generation: language models and tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["TextGenerator", "Tokenizer"]


@runtime_checkable
class Tokenizer(Protocol):
    """Converts between text and token ids."""

    def encode(self, text: str) -> Sequence[int]:
        """Return the token ids of a string."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the string represented by the token ids."""


@runtime_checkable
class TextGenerator(Protocol):
    """A language model. The argument names follow the transformers library."""

    def generate(
        self, tokens: Tensor, *, max_new_tokens: int, do_sample: bool, temperature: float, top_k: int
    ) -> Tensor:
        """Return the sequences followed by the generated tokens.

        Sampling uses torch's default generator for the device on which ``tokens`` is stored.

        Args:
            tokens: token ids of shape ``[N, T]`` with ``T >= 1``.
            max_new_tokens: the maximum number of generated tokens.
            do_sample: whether to sample; otherwise the most likely token is used, and the following arguments are ignored.
            temperature: the divisor of the logits before the softmax.
            top_k: sample from the ``top_k`` most likely tokens; 0 for all tokens.
        """
