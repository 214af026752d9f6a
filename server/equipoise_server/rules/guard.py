"""The guard: it tries uniform weights against the policy's, and serves what lowers the guard loss faster.

Settled by measurement (trainer/RESULTS.md, "The guard"): neither the gap between target and guard loss nor a
first-order test on guard data tells helpful weights from harmful ones; what the loss does over a stretch does.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

FIRST_TRIAL = 8
"""Guard losses before the first trial."""
SHORTEST = 2
"""Guard losses of a stretch, at least."""
WEIGHTS_PATIENCE = 2.0
"""A trial of the weights takes so many times as long as one of uniform: a rule's memory needs time to turn."""
SMOOTHING = 4
"""The level of the loss looks back over this part of a stretch."""
MARGIN = 0.1
"""What uniform may fall short by, and the weights must win by, as a share of the other's decrease."""
GIVEN_UP = 0.5
"""A trial of uniform ends early when the loss has risen by this share of what it fell by in the stretch before."""
LEAST_OF_TRIAL = 8
"""... but not within the first part of the trial, this one."""
MAX_GROWTH = 8
"""A trial that was lost is repeated after 4, then 8 times as many guard losses as so far; one that was won, after 2."""
RECOVERY = 2
"""Until there are so many times as many guard losses, a rise of the loss is put down to the trial that was lost."""

_LARGEST_LOSS = 1e300
_LARGEST_NUMBER = 4 * _LARGEST_LOSS
"""A decrease is the difference of two levels."""
_LARGEST_COUNT = 2**53
_COUNTS = ("trials_won", "trials_lost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What the guard remembers: plain numbers, so that state, log and exports keep every bit.

    Training is cut into stretches, each a share of all guard losses so far. In most of them the incumbent is served:
    the policy's weights or uniform ones. In a trial the other one is.

    Attributes:
        count: guard losses so far.
        level: smoothed guard loss, nats.
        begin: `count` at the start of this stretch.
        end: `count` at its end.
        earlier: level at the start of the stretch, nats.
        decrease: by how much the level fell in the stretch before this trial, nats.
        uniform: whether uniform weights are the incumbent.
        trial: whether this stretch is a trial.
        lost: trials lost since the incumbent became it.
        next_trial: `count` from which on there may be a trial.
        next_alarm: `count` from which on a rising loss brings a trial at once.
        trials_won: trials after which the policy's weights were served.
        trials_lost: trials after which uniform ones were.
    """

    count: int = 0
    level: float = 0.0
    begin: int = 0
    end: int = SHORTEST
    earlier: float = 0.0
    decrease: float = 0.0
    uniform: bool = False
    trial: bool = False
    lost: int = 0
    next_trial: int = FIRST_TRIAL
    next_alarm: int = FIRST_TRIAL
    trials_won: int = 0
    trials_lost: int = 0

    @property
    def strength(self) -> float:
        """g: 1 while uniform weights are served, else 0."""
        return float(self.uniform != self.trial)

    def after(self, loss: float, *, stretch: float) -> "Guard":
        """The guard after a guard loss that was measured under the weights served so far.

        Sums, products and quotients of float64 alone: one result on every machine.

        Args:
            loss: mean loss on guard B, nats, finite.
            stretch: length of a stretch as a share of all guard losses so far.
        """
        seen = self._with_level(min(max(loss, -_LARGEST_LOSS), _LARGEST_LOSS))
        if seen.trial:
            return seen._judged(stretch)
        return seen if seen.count < seen.end else seen._at_end(stretch)

    def to_scalars(self) -> dict[str, float]:
        """All of it by name."""
        return {name: float(value) for name, value in asdict(self).items()}

    @classmethod
    def from_scalars(cls, scalars: Mapping[str, float]) -> "Guard":
        """What `to_scalars` gave, the counts of trials or not. Raises ValueError naming field, value and rule."""
        scalars = {**dict.fromkeys(_COUNTS, 0.0), **scalars}
        kinds = {name: type(value) for name, value in asdict(cls()).items()}
        if set(scalars) != set(kinds):
            raise ValueError(f"guard has {sorted(scalars)}: must have {sorted(kinds)}")
        for name, value in scalars.items():
            top = {bool: 1.0, int: _LARGEST_COUNT, float: _LARGEST_NUMBER}[kinds[name]]
            whole = kinds[name] is float or (value >= 0 and float(value).is_integer())
            if not (abs(value) <= top and whole):
                what = "a number" if kinds[name] is float else "a whole number"
                raise ValueError(f"guard.{name} = {value}: must be {what} up to {top:g}")
        return cls(**{name: kinds[name](value) for name, value in scalars.items()})

    def _with_level(self, loss: float) -> "Guard":
        horizon = 1.0 + (self.end - self.begin) / SMOOTHING
        level = loss if self.count == 0 else self.level + (loss - self.level) / horizon
        return replace(self, count=self.count + 1, level=level)

    def _at_end(self, stretch: float) -> "Guard":
        """The end of a stretch of the incumbent."""
        decrease = self.earlier - self.level
        due = self.count >= self.next_trial or (decrease < 0 and self.count >= self.next_alarm)
        return replace(self, decrease=decrease, trial=due)._next_stretch(stretch)

    def _judged(self, stretch: float) -> "Guard":
        """A trial, which may be over."""
        decrease, length = self.earlier - self.level, self.end - self.begin
        if self.count >= self.end:
            margin = MARGIN * abs(self.decrease)
            return self._decided(decrease > self.decrease + (margin if self.uniform else -margin), stretch)
        long_enough = self.count - self.begin >= max(SHORTEST, length / LEAST_OF_TRIAL)
        if not self.uniform and long_enough and -decrease > GIVEN_UP * abs(self.decrease):
            return self._decided(False, stretch)
        return self

    def _decided(self, won: bool, stretch: float) -> "Guard":
        lost = 0 if won else self.lost + 1
        decided = replace(
            self,
            uniform=self.uniform != won,
            trial=False,
            lost=lost,
            trials_won=self.trials_won + (self.uniform == won),
            trials_lost=self.trials_lost + (self.uniform != won),
            next_trial=self.count * min(2 ** (lost + 1), MAX_GROWTH),
        )._next_stretch(stretch)
        recovered = max(self.count * RECOVERY, decided.end + 1)
        return replace(decided, next_alarm=self.count if won else recovered)

    def _next_stretch(self, stretch: float) -> "Guard":
        share = stretch * WEIGHTS_PATIENCE if self.uniform else stretch
        length = max(SHORTEST, math.ceil(self.count * share))
        return replace(self, earlier=self.level, begin=self.count, end=self.count + length)
