"""The page's tables: studies over seeds, every seed, and one run with an online policy."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from equipoise_trainer.reproduction.claims import times
from equipoise_trainer.reproduction.findings import Findings, find, median, online_cost, search_cost
from equipoise_trainer.reproduction.runs import FinishedRun
from equipoise_trainer.reproduction.studies import LN2

Row: TypeAlias = tuple[str, ...]
Found: TypeAlias = Mapping[str, Sequence[tuple[FinishedRun, Findings]]]
"""Finished runs and their numbers by study, by seed."""

STUDY_HEADINGS: Row = (
    "study",
    "seeds",
    "× target",
    "× unseen",
    "matched, target",
    "matched, unseen",
    "online, unseen, at its cost",
    "end unseen: uniform",
    "matched",
    "policy",
    "area target",
    "its largest rise",
    "SIM, least ratio",
    "Spearman of SIM and CR, least",
)

SEED_HEADINGS: Row = (
    "study",
    "seed",
    "rows",
    "× target",
    "× unseen",
    "matched, target",
    "matched, unseen",
    "area target",
    "area unseen",
    "end unseen: uniform, matched, policy",
    "CR, ln|V|/nats",
    "CR, log2|V|/nats",
    "SIM",
    "SIM, adjoint",
    "effective, mean (least)",
)

ONLINE_HEADINGS: Row = (
    "study",
    "seed",
    "online × target",
    "online × unseen",
    "cost of its step",
    "× unseen at its cost",
    "end unseen: uniform, online, near-optimal",
    "cost of the search, plain runs",
    "seconds per policy epoch",
)


def found_in(runs: Mapping[str, Sequence[FinishedRun]], *, reference_nats: float | None = None) -> Found:
    """Numbers of all runs; `reference_nats` None: each study's own."""
    return {
        name: [(run, find(run, reference_nats=reference_nats or float(run.study["reference_nats"]))) for run in seeds]
        for name, seeds in runs.items()
    }


def study_rows(found: Found) -> tuple[Row, ...]:
    """One row for each study: medians with the least and the most, means with their deviation over seeds."""
    return tuple(_study_row(name, seeds) for name, seeds in found.items())


def seed_rows(found: Found) -> tuple[Row, ...]:
    """One row for each seed of each study."""
    return tuple(_seed_row(name, run, each) for name, run, each in _all(found))


def online_rows(found: Found) -> tuple[Row, ...]:
    """One row for each seed beside which an online policy was run."""
    return tuple(_online_row(name, run, each) for name, run, each in _all(found) if each.online is not None)


def settings_of(run: FinishedRun) -> str:
    """What a study's runs were, and how far they were run, in words."""
    study, last = run.study, run.final.epoch
    planned = int(study["policy_epochs"])
    if "vocabulary" in study:
        data = (
            f"{study['corpus']}, N = {study['train_size']} sequences of {study['length']} tokens, half of them with "
            f"the paper's noise, M = {study['target_size']}, V = {study['vocabulary']}, width {study['width']}, "
            f"{study['layers']} layers"
        )
    else:
        data = f"data {study['dataset']}, M = {study['target_size']}, {100 * study['flipped']:g} % flipped"
    warm_up = int(study.get("warm_up", 0))
    return (
        f"{study['name']}: {data}, T = {study['steps']}, η = {study['learning_rate']:g}, "
        f"ε = {study['step_size']:g} falling to 0 over {planned} policy epochs"
        + (f", after growing to it over {warm_up}" if warm_up else "")
        + (f"; read off after {last} of them." if last < planned else ".")
    )


def _all(found: Found) -> Iterator[tuple[str, FinishedRun, Findings]]:
    return ((name, run, each) for name, seeds in found.items() for run, each in seeds)


def _study_row(name: str, seeds: Sequence[tuple[FinishedRun, Findings]]) -> Row:
    runs = [each for _, each in seeds]
    costs = {each.seed: online_cost(run) for run, each in seeds}

    def online(each: Findings) -> float | None:
        return None if each.online is None or each.online[1] is None else each.online[1] / costs[each.seed]

    return (
        name,
        ", ".join(str(each.seed) for each in runs),
        _spread(runs, lambda each: each.accelerations[0]),
        _spread(runs, lambda each: each.accelerations[1]),
        _spread(runs, lambda each: each.matched[0]),
        _spread(runs, lambda each: each.matched[1]),
        _spread([each for each in runs if each.online is not None], online),
        _deviation(runs, lambda each: each.ends[1]),
        _deviation(runs, lambda each: each.matched_ends[1]),
        _deviation(runs, lambda each: each.final_ends[1]),
        _change(*(float(np.mean([area[0] for area in pair])) for pair in _areas(runs))),
        f"{100 * max(each.largest_rise for each in runs):.1f} %",
        f"×{min(each.sim_ratio for each in runs):.1f}",
        f"{min(each.spearman for each in runs):.3f}",
    )


def _seed_row(name: str, run: FinishedRun, each: Findings) -> Row:
    mean, least = each.effective_share
    return (
        name,
        str(each.seed),
        run.rows,
        times(each.accelerations[0]),
        times(each.accelerations[1]),
        times(each.matched[0]),
        times(each.matched[1]),
        _change(each.areas[0], each.final_areas[0]),
        _change(each.areas[1], each.final_areas[1]),
        f"{each.ends[1]:.3f}, {each.matched_ends[1]:.3f}, {each.final_ends[1]:.3f}",
        f"{each.compression[0]:.2f} → {each.compression[1]:.2f}",
        f"{each.compression[0] / LN2:.2f} → {each.compression[1] / LN2:.2f}",
        _change(*each.sim),
        f"{each.adjoint_sim[0]:.2f} → {each.adjoint_sim[1]:.2f}",
        f"{100 * mean:.0f} % ({100 * least:.0f} %)",
    )


def _online_row(name: str, run: FinishedRun, each: Findings) -> Row:
    assert run.online is not None, "the caller looks"
    assert each.online is not None, "the caller looks"
    cost, unseen = online_cost(run), each.online[1]
    seconds = f"{np.median(run.epoch_seconds):.2f}" if run.epoch_seconds else "–"
    return (
        name,
        str(run.seed),
        times(each.online[0]),
        times(unseen),
        f"{cost:.2f}",
        times(None if unseen is None else unseen / cost),
        f"{each.ends[1]:.3f}, {run.online.test_loss[-1]:.3f}, {each.final_ends[1]:.3f}",
        f"{search_cost(run):.0f}",
        f"{seconds} ({run.rows})",
    )


def _areas(runs: Sequence[Findings]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    return [each.areas for each in runs], [each.final_areas for each in runs]


def _spread(runs: Sequence[Findings], pick: Callable[[Findings], float | None]) -> str:
    """Median (least to most); a run that never got there is the least."""
    if not runs:
        return "not run"
    values = [pick(each) for each in runs]
    if len(values) == 1:
        return times(values[0])
    ordered = sorted(values, key=lambda value: value or 0.0)
    return f"{times(median(values))} ({times(ordered[0])} to {times(ordered[-1])})"


def _deviation(runs: Sequence[Findings], pick: Callable[[Findings], float]) -> str:
    values = [pick(each) for each in runs]
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{math.fsum(values) / len(values):.3f}{spread}"


def _change(before: float, after: float) -> str:
    return f"{before:.3f} → {after:.3f}"
