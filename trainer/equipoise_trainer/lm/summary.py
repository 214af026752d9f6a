"""What an experiment with language models shows: one row per method, differences paired by seed."""

from collections.abc import Sequence
from dataclasses import dataclass

from equipoise_trainer.lm.methods import METHODS
from equipoise_trainer.lm.records import RunRecord
from equipoise_trainer.summary import Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSummary:
    """One method over all seeds; losses in nats.

    Attributes:
        method: its name.
        title: in tables.
        learning_rate: chosen on guard B.
        test_loss: at the step with the lowest loss on B.
        lowest_test_loss: over all logged steps: what speed-ups are measured against.
        final_test_loss: after the last step.
        below_uniform: by seed, uniform's test loss minus this one, where both are read off; empty without uniform.
        final_below_uniform: the same after the last step.
        speed_ups: by seed, compute units of uniform to its lowest test loss over those of this method to the same
            loss; None: never reached. Empty without uniform.
        units: of the whole run.
        seconds: of the whole run, wall-clock, measuring included.
        shares: share of the weight in training on each of `recipes.SOURCES` over the second half of the steps, mean
            over seeds; None: not trained on them.
        auroc: of finding noisy sequences from the policy's scores, by seed; empty: none.
    """

    method: str
    title: str
    learning_rate: float
    test_loss: Spread
    lowest_test_loss: Spread
    final_test_loss: Spread
    below_uniform: tuple[float, ...]
    final_below_uniform: tuple[float, ...]
    speed_ups: tuple[float | None, ...]
    units: float
    seconds: float
    shares: tuple[float, ...] | None
    auroc: tuple[float, ...]


def summarise(runs: Sequence[RunRecord]) -> list[MethodSummary]:
    """One row per method, in the order of the table."""
    uniform = of(runs, "uniform")
    return [_row(same, uniform) for name in METHODS if (same := of(runs, name))]


def of(runs: Sequence[RunRecord], method: str) -> list[RunRecord]:
    """The runs of a method, by seed."""
    return sorted((run for run in runs if run.method == method), key=lambda run: run.seed)


def speed_up(ours: RunRecord, uniform: RunRecord) -> float | None:
    """Compute units of uniform to its lowest test loss, over ours to the same loss; None: never reached.

    Uniform's are those at the first logged step with that loss, ours are interpolated between two of them.
    """
    level = min(uniform.curve.test_loss)
    theirs = uniform.curve.units[uniform.curve.test_loss.index(level)]
    spent = ours.units_to(level)
    return None if spent is None else theirs / max(spent, 1.0)


def _row(runs: Sequence[RunRecord], uniform: Sequence[RunRecord]) -> MethodSummary:
    pairs = list(zip(runs, uniform, strict=True)) if uniform else []
    first = runs[0]
    return MethodSummary(
        method=first.method,
        title=METHODS[first.method].title,
        learning_rate=first.learning_rate,
        test_loss=Spread.of([run.test_loss for run in runs]),
        lowest_test_loss=Spread.of([min(run.curve.test_loss) for run in runs]),
        final_test_loss=Spread.of([run.curve.test_loss[-1] for run in runs]),
        below_uniform=tuple(theirs.test_loss - run.test_loss for run, theirs in pairs),
        final_below_uniform=tuple(theirs.curve.test_loss[-1] - run.curve.test_loss[-1] for run, theirs in pairs),
        speed_ups=tuple(speed_up(run, theirs) for run, theirs in pairs),
        units=_mean([run.curve.units[-1] for run in runs]),
        seconds=_mean([run.seconds for run in runs]),
        shares=_shares(runs),
        auroc=tuple(run.auroc for run in runs if run.auroc is not None),
    )


def _shares(runs: Sequence[RunRecord]) -> tuple[float, ...] | None:
    late = [shares for run in runs for shares in run.curve.shares[len(run.curve.shares) // 2 :] if shares is not None]
    return tuple(_mean(column) for column in zip(*late, strict=True)) if late else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
