"""Which batches of a job are measured."""

from dataclasses import dataclass

from equipoise.errors import is_integer, require


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """By the number of a batch, or micro-batch, from 0; the options of `WeightedSteps`, which documents them.

    Raises:
        InvalidRequestError: an option breaks a rule.
    """

    every: int = 1
    compare_every: int = 0
    start: int = 0
    until: int | None = None
    guard_every: int | None = None

    def __post_init__(self) -> None:
        for field, value, least in (
            ("measure_every", self.every, 0),
            ("compare_every", self.compare_every, 0),
            ("measure_from", self.start, 0),
            ("guard_every", 1 if self.guard_every is None else self.guard_every, 1),
        ):
            fits = is_integer(value, least, 1 << 62)
            require(fits, field=field, value=value, rule=f"must be an integer of at least {least}")
        rule = "must be at least 1 where compare_every is 0: weights follow from contributions or losses of the target"
        require(self.every + self.compare_every > 0, field="measure_every", value=self.every, rule=rule)
        rule = "needs measure_every, which is 0: no batch is measured"
        require(self.every > 0 or self.start == 0, field="measure_from", value=self.start, rule=rule)
        require(self.every > 0 or self.until is None, field="measure_until", value=self.until, rule=rule)
        fits = self.until is None or is_integer(self.until, self.start + 1, 1 << 62)
        rule = f"must be an integer above measure_from, which is {self.start}"
        require(fits, field="measure_until", value=self.until, rule=rule)
        fits = self.guard_every is None or self.until is not None
        rule = "needs measure_until, the batch from which on it counts"
        require(fits, field="guard_every", value=self.guard_every, rule=rule)

    def __str__(self) -> str:
        """What is measured, as it was given, where it is not contributions of all batches alone."""
        given = (
            ("measure_every", self.every, 1),
            ("compare_every", self.compare_every, 0),
            ("measure_from", self.start, 0),
            ("measure_until", self.until, None),
        )
        return ", ".join(f"{name} = {value}" for name, value, usual in given if value != usual)

    @property
    def leaves_out(self) -> bool:
        """Whether contributions of any batch are not measured."""
        return self.every != 1 or self.start > 0 or self.until is not None

    def is_over(self, batch: int) -> bool:
        """Whether no contributions are measured from a batch on."""
        return self.every == 0 or (self.until is not None and batch >= self.until)

    def measures(self, batch: int) -> bool:
        """Whether contributions of a batch are measured."""
        return batch >= self.start and not self.is_over(batch) and (batch - self.start) % self.every == 0

    def hears(self, batch: int) -> bool:
        """Whether the loss on guard B is measured for its own sake before a batch."""
        if self.guard_every is None or self.until is None or batch < self.until:
            return False
        return (batch - self.until) % self.guard_every == 0
