"""Byte-level BPE, learned from the corpus at hand."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"
"""Between two paragraphs; id 0."""


class Vocabulary:
    """Tokens of a text and back; every text can be written with it.

    Args:
        paragraphs: what it is learned from.
        size: V; at least 257: the bytes and the end of a paragraph.

    Raises:
        ValueError: the text is too short for so many tokens.
    """

    def __init__(self, paragraphs: Sequence[str], *, size: int) -> None:
        self.size = size
        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        self._tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self._tokenizer.train_from_iterator(paragraphs, trainer)
        if self._tokenizer.get_vocab_size() != size:
            found = self._tokenizer.get_vocab_size()
            raise ValueError(f"vocabulary: {size}, but the corpus holds {found} tokens only, must be at most that")

    def encode(self, paragraphs: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of each paragraph, the end included."""
        end = self._tokenizer.token_to_id(END)
        encoded = self._tokenizer.encode_batch(list(paragraphs), add_special_tokens=False)
        return [np.array([*each.ids, end], dtype=np.int64) for each in encoded]

    def decode(self, tokens: NDArray[np.int64]) -> str:
        """The text of token ids."""
        text: str = self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        return text
