"""What writes text: a model that goes on with tokens, and what tokens mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["TextGenerator", "Tokenizer"]


@runtime_checkable
class Tokenizer(Protocol):
    """Translates between text and the numbers of tokens."""

    def encode(self, text: str) -> Sequence[int]:
        """Return the tokens of a text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""


@runtime_checkable
class TextGenerator(Protocol):
    """A language model. The names of the arguments are those of the transformers library."""

    def generate(
        self, tokens: Tensor, *, max_new_tokens: int, do_sample: bool, temperature: float, top_k: int
    ) -> Tensor:
        """Return sequences, of shape [N, T], with what follows them behind.

        It draws from torch's default generator of the tokens' device.

        Args:
            tokens: at least one for each sequence.
            max_new_tokens: how many are added, at most.
            do_sample: whether they are drawn; else each is the likeliest, and the other arguments mean nothing.
            temperature: what scores are divided by before softmax.
            top_k: how many of the likeliest are drawn from; 0 for all.
        """
