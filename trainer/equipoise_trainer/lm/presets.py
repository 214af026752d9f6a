"""Sizes of the language model and of its data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A model, its vocabulary and how it is trained unless told otherwise.

    Attributes:
        name: as in `--preset`.
        width: of the hidden state.
        layers: blocks.
        heads: of attention; divides the width.
        length: tokens of a sequence, T.
        vocabulary: tokens, V.
        batch_size: sequences of a step, B.
        steps: of a run.
        learning_rates: of AdamW, from which every method chooses on guard B.
    """

    name: str
    width: int
    layers: int
    heads: int
    length: int
    vocabulary: int
    batch_size: int
    steps: int
    learning_rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads}, must divide the width, {self.width}")


PRESETS: Final[Mapping[str, Preset]] = {
    preset.name: preset
    for preset in (
        Preset(
            name="small",
            width=64,
            layers=2,
            heads=4,
            length=32,
            vocabulary=1000,
            batch_size=32,
            steps=300,
            learning_rates=(1e-3, 2e-3, 4e-3, 8e-3),
        ),
        Preset(
            name="paper",
            width=128,
            layers=2,
            heads=8,
            length=64,
            vocabulary=5000,
            batch_size=32,
            steps=300,
            learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
        ),
    )
}
"""By name. `paper` is the shape of arXiv 2402.17759, appendix D."""
