"""The service in fifty lines of arithmetic: what policies hold and what every step must be answered.

Independent of the server's code: rule `ema_sign` with contributions of ±1, whose running RMS is 1, so that the
statistic is a plain moving average.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

DECAY = 0.6
FLOOR = 0.01


@dataclass(slots=True)
class Model:
    """One policy.

    Attributes:
        uid: of this incarnation.
        num_examples: N.
        version: steps applied or refused.
        averages: the statistic of each scored example.
        trainers: last sequence by trainer.
        refused: reasons of refused steps, by trainer and sequence.
        seen: newest (epoch, version) that any answer showed.
    """

    uid: str
    num_examples: int
    version: int = 0
    averages: dict[int, float] = field(default_factory=dict)
    trainers: dict[str, int] = field(default_factory=dict)
    refused: dict[tuple[str, int], str] = field(default_factory=dict)
    seen: tuple[int, int] = (0, 0)

    def apply(self, signs: Mapping[int, int]) -> None:
        """A step that scored these examples."""
        self.version += 1
        for example, sign in signs.items():
            old = self.averages.get(example)
            self.averages[example] = sign if old is None else DECAY * old + (1 - DECAY) * sign

    def refuse(self) -> None:
        """A step that was refused: a version, and nothing else."""
        self.version += 1

    def weights(self, ids: Iterable[int]) -> list[float]:
        """Served weights."""
        raw = {example: 1.0 if average > 0 else FLOOR for example, average in self.averages.items()}
        scale = len(raw) / sum(raw.values()) if raw else 1.0
        return [raw[example] * scale if example in raw else 1.0 for example in ids]

    def effective_examples(self) -> float:
        """1/Σγ²."""
        weights = self.weights(range(self.num_examples))
        return sum(weights) ** 2 / sum(weight * weight for weight in weights)

    def fork(self, uid: str) -> "Model":
        """A new policy with the same state, that has seen no step and no trainer."""
        return Model(uid, self.num_examples, averages=dict(self.averages))

    def observe(self, epoch: int, version: int) -> None:
        """An answer showed this: it may not go back."""
        assert (epoch, version) >= self.seen, f"{(epoch, version)} after {self.seen}"
        self.seen = epoch, version
