"""The guard: against a second implementation, in worlds where one of the two ways is better, and at its edges."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from equipoise_server.rules import Guard

STRETCH = 0.125


def guarded(losses: Iterable[float], *, stretch: float = STRETCH, start: Guard | None = None) -> list[Guard]:
    """The guard after each loss."""
    seen = [start or Guard()]
    for loss in losses:
        seen.append(seen[-1].after(loss, stretch=stretch))
    return seen[1:]


def guard_by_hand(losses: list[float], stretch: float) -> tuple[list[float], list[float]]:
    """g after each loss, and who was served after each trial, told as a story over the whole list."""
    level, levels, strengths, outcomes = math.nan, [], [], []
    incumbent, lost, allowed, alarmed = 0.0, 0, 8, 8
    start, stop, trial_of, fell = 0, 2, None, 0.0
    for count, loss in enumerate(losses, 1):
        level = loss if count == 1 else level + (loss - level) / (1 + (stop - start) / 4)
        levels.append(level)
        fall = (levels[start - 1] if start else 0.0) - level
        over, won = count == stop, False
        if trial_of is not None:
            won = over and fall > fell + abs(fell) * (0.1 if trial_of == 0.0 else -0.1)
            early = trial_of == 1.0 and count - start >= max(2, (stop - start) / 8) and -fall > abs(fell) / 2
            if over or early:
                incumbent, lost = (trial_of, 0) if won else (incumbent, lost + 1)
                allowed = count * {0: 2, 1: 4}.get(lost, 8)
                pause = max(count, max(2, math.ceil(count * stretch * (1 + incumbent))) + 1)
                alarmed = count if won else count + pause
                trial_of, over = None, True
                outcomes.append(incumbent)
        elif over:
            fell = fall
            if count >= allowed or (fall < 0 and count >= alarmed):
                trial_of = 1.0 - incumbent
        if over:
            start, stop = count, count + max(2, math.ceil(count * stretch * (1 + incumbent)))
        strengths.append(incumbent if trial_of is None else trial_of)
    return strengths, outcomes


walks = st.builds(
    lambda seed, drift, noise, size: (
        3.0 * 0.98 ** (drift * np.arange(size)) + noise * np.random.default_rng(seed).standard_normal(size)
    ).tolist(),
    st.integers(0, 2**32 - 1),
    st.floats(-0.2, 2.0),
    st.floats(0.0, 0.3),
    st.integers(1, 400),
)


@settings(deadline=None)
@given(losses=walks, stretch=st.sampled_from([0.01, 0.1, 0.125, 0.3, 1.0]))
def test_g_is_that_of_a_second_implementation(losses: list[float], stretch: float) -> None:
    seen = guarded(losses, stretch=stretch)
    strengths, outcomes = guard_by_hand(losses, stretch)
    assert [guard.strength for guard in seen] == strengths
    assert seen[-1].count == len(losses)
    assert (seen[-1].trials_won, seen[-1].trials_lost) == (outcomes.count(0.0), outcomes.count(1.0))


@settings(deadline=None)
@given(losses=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=60))
@example([0.0] * 9 + [9.999999999999999e299, 0.0, -6.111111111111114e299])
@example([1e308] * 10 + [-1e308] * 12)
def test_any_losses_give_a_g_in_0_1_and_numbers_that_travel(losses: list[float]) -> None:
    for guard in guarded(losses):
        assert 0.0 <= guard.strength <= 1.0
        scalars = guard.to_scalars()
        assert all(math.isfinite(value) for value in scalars.values())
        assert Guard.from_scalars(scalars) == guard
        older = {name: value for name, value in scalars.items() if not name.startswith("trials_")}
        assert Guard.from_scalars(older) == replace(guard, trials_won=0, trials_lost=0)


@settings(deadline=None)
@given(losses=walks, scale=st.sampled_from([2.0**-40, 0.5, 2.0**30]))
def test_the_unit_of_the_loss_is_irrelevant(losses: list[float], scale: float) -> None:
    plain = [guard.strength for guard in guarded(losses)]
    assert plain == [guard.strength for guard in guarded([scale * loss for loss in losses])]


@settings(deadline=None)
@given(losses=walks, lower=st.floats(0.0, 2.0))
def test_a_trial_that_goes_better_is_never_judged_worse(losses: list[float], lower: float) -> None:
    begin = next((index for index, guard in enumerate(guarded(losses), 1) if guard.trial), None)
    if begin is None:
        return
    start = guarded(losses[:begin])[-1]
    trial = losses[begin : start.end] + [losses[-1]] * max(0, start.end - len(losses))

    def won(series: list[float]) -> bool:
        judged = next(guard for guard in guarded(series, start=start) if not guard.trial or guard.begin != start.begin)
        return judged.uniform != start.uniform

    assert won([loss - lower for loss in trial]) >= won(trial)


def in_world(fall: Callable[[float, int], float], *, steps: int, noise: float = 0.0) -> list[float]:
    """g over a run in which the loss falls each step by `fall(g, step)`."""
    guard, loss, served = Guard(), 4.0, []
    for step in range(steps):
        guard = guard.after(loss + noise * math.sin(12.9898 * step) * math.cos(78.233 * step), stretch=STRETCH)
        served.append(guard.strength)
        loss -= fall(guard.strength, step)
    return served


def share(served: list[float]) -> float:
    return sum(served) / len(served)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_where_weights_hurt_uniform_weights_are_served(noise: float) -> None:
    served = in_world(lambda g, t: (0.4 + 0.6 * g) / (t + 10), steps=500, noise=noise)
    assert share(served[:7]) == 0.0
    assert share(served) > 0.85
    assert served[-1] == 1.0


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_where_weights_help_the_guard_stays_out_of_the_way(noise: float) -> None:
    served = in_world(lambda g, t: (1.0 - 0.6 * g) / (t + 10), steps=500, noise=noise)
    assert share(served) < 0.15
    assert served[-1] == 0.0


def test_where_uniform_weights_undo_what_was_learned_trials_end_early() -> None:
    served = in_world(lambda g, t: -0.05 if g else 1.0 / (t + 10), steps=1000)
    assert 0.0 < share(served) < 0.02


def test_when_the_target_is_being_overfitted_the_policy_goes_back_to_uniform() -> None:
    def fall(g: float, t: int) -> float:
        return 0.5 / (t + 10) if g else (1.0 / (t + 10) if t < 200 else -0.002)

    served = in_world(fall, steps=600)
    assert share(served[:200]) < 0.1
    assert share(served[260:]) > 0.8


def test_a_policy_that_helps_later_is_found_later() -> None:
    served = in_world(lambda g, t: (0.2 if (g == 0.0) == (t < 100) else 1.0) / (t + 10), steps=1000)
    assert share(served[30:100]) > 0.8
    assert share(served[500:]) < 0.1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": -1.0}, r"guard.count = -1.0: must be a whole number"),
        ({"end": 0.5}, r"guard.end = 0.5: must be a whole number"),
        ({"uniform": 2.0}, r"guard.uniform = 2.0: must be a whole number up to 1"),
        ({"level": math.inf}, r"guard.level = inf: must be a number"),
        ({"lost": math.nan}, r"guard.lost = nan: must be a whole number"),
        ({"colour": 1.0}, r"guard has .*'colour'.*: must have"),
    ],
)
def test_scalars_that_no_guard_has_are_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard.from_scalars(Guard().to_scalars() | changed)


def test_g_follows_from_incumbent_and_trial() -> None:
    uniform = Guard(uniform=True)
    assert [guard.strength for guard in (Guard(), Guard(trial=True))] == [0.0, 1.0]
    assert [guard.strength for guard in (uniform, replace(uniform, trial=True))] == [1.0, 0.0]
