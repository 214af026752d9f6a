"""Pictures that stand beside the paper's figures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equipoise_trainer.offline.measures import BINS, Measures
from equipoise_trainer.perceptron import Array
from equipoise_trainer.plots import FLIPPED, GRID, MUTED, SERVED, STYLE
from equipoise_trainer.reproduction.findings import LOW, compressions, find, median, sims
from equipoise_trainer.reproduction.runs import FinishedRun
from equipoise_trainer.reproduction.scaling import ScalingFound

Runs: TypeAlias = Mapping[str, Sequence[FinishedRun]]
"""Finished runs by study, by seed."""

UNIFORM, MATCHED, ONLINE = "#374151", "#b08968", "#e08e0b"
PALETTE = (SERVED, FLIPPED, "#2a9d5c", "#e08e0b", "#7c3aed", "#0891b2", "#374151")


def save_curves(runs: Runs, titles: Mapping[str, str], *, reference_nats: float, path: Path) -> None:
    """Losses of the first seed of each study: uniform, near-optimal, norm-matched and online."""
    columns = min(4, len(runs))
    lines = -(-len(runs) // columns)
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # matplotlib's stubs name every key
        figure = Figure(figsize=(4.2 * columns, 3.6 * lines + 0.5), dpi=110, facecolor="white", layout="constrained")
        panels = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
        for axes, (name, seeds) in zip(panels, runs.items(), strict=False):
            found = [find(run, reference_nats=reference_nats) for run in seeds]
            target, test = (median([each.accelerations[split] for each in found]) for split in (0, 1))
            axes.set_title(f"{titles.get(name, name)}\n×{_times(target)} on target, ×{_times(test)} unseen")
            _draw_curves(axes, seeds[0])
        for axes in panels[len(runs) :]:
            axes.set_visible(False)
        # The panel that shows most kinds of runs names them.
        max(panels[: len(runs)], key=lambda axes: len(axes.lines)).legend(frameon=False, fontsize=8)
        figure.savefig(path)


def save_law(runs: Runs, titles: Mapping[str, str], *, reference_nats: float, path: Path) -> None:
    """The Learning Law: area over policy epochs, SIM against compression (Figure 7), SIM over steps."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(13, 4.4), dpi=110, facecolor="white", layout="constrained")
        area, law, along = figure.subplots(1, 3)
        area.set_title("Area under the target-loss curve, uniform = 1")
        law.set_title("SIM against compression ratio (cf. Figure 7)")
        for color, (name, seeds) in zip(PALETTE * 3, runs.items(), strict=False):
            for run in seeds:
                epochs = np.array([each.epoch for each in run.measures])
                areas = np.array([each.area for each in run.measures])
                label = titles.get(name, name) if run is seeds[0] else None
                area.plot(epochs / epochs[-1], areas / areas[0], color=color, linewidth=1.3, label=label)
                ratios = compressions(run, reference_nats=reference_nats)
                law.plot(ratios, sims(run), color=color, marker="o", markersize=3, linewidth=1)
        area.set_xlabel("policy epoch, share of all")
        area.set_ylim(0, 1.5)
        area.legend(frameon=False, fontsize=7.5)
        law.set_xlabel("compression ratio, ln|V| / nats, on target")
        law.set_yscale("log")
        name = next(iter(runs))
        along.set_title(f"SIM over steps: {titles.get(name, name)}")
        _draw_sims(along, runs[name][0].measures)
        for axes in (area, law, along):
            _tidy(axes)
        figure.savefig(path)


def save_zeros(runs: Runs, titles: Mapping[str, str], *, reference_nats: float, path: Path) -> None:
    """What gets no weight: Figures 8 to 10, and flipped labels."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(16, 4.4), dpi=110, facecolor="white", layout="constrained")
        eight, nine, ten, flips = figure.subplots(1, 4)
        eight.set_title("Zero weights among CT ≤ 0 (cf. Figure 8)")
        nine.set_title("Weights of learned examples (cf. Figure 9)")
        ten.set_title("Zero weights among CT > 0 (cf. Figure 10)")
        flips.set_title("Zero weights: flipped, and (thin) clean")
        edges = np.arange(1, BINS + 1) / BINS
        for color, (name, seeds) in zip(PALETTE * 3, runs.items(), strict=False):
            label = titles.get(name, name)
            for run in seeds:
                shares = [float(np.nanmean(each.zero_nonpositive)) for each in run.measures]
                eight.plot(
                    compressions(run, reference_nats=reference_nats), shares, color=color, marker="o", markersize=3
                )
            learned = np.sum([run.final.learned for run in seeds], axis=0)
            if learned.sum():
                nine.plot(edges, np.cumsum(learned) / learned.sum(), color=color, label=label)
            final = [run.final for run in seeds]
            ten.plot(final[0].looked, _over(final, lambda each: each.zero_positive), color=color)
            if seeds[0].planted.flipped.any():
                flips.plot(final[0].looked, _over(final, lambda each: each.zero_flipped), color=color, linewidth=2)
                flips.plot(final[0].looked, _over(final, lambda each: each.zero_clean), color=color, linewidth=1)
        nine.axvline(LOW, color=MUTED, linewidth=0.8)
        nine.set_xlabel("weight / largest weight of its row, cumulative")
        if nine.lines[:-1]:
            nine.legend(frameon=False, fontsize=7.5, loc="lower right")
        eight.set_xlabel("compression ratio, ln|V| / nats, on target")
        flips.set_visible(any(seeds[0].planted.flipped.any() for seeds in runs.values()))
        for axes in (ten, flips):
            axes.set_xlabel("training step")
        for axes in (eight, nine, ten, flips):
            axes.set_ylim(-0.02, 1.02)
            _tidy(axes)
        figure.savefig(path)


def save_scaling(found: Sequence[ScalingFound], *, path: Path) -> None:
    """Laws and curves (cf. Figure 11), and what another L0 does to B, β and the acceleration."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        columns = len(found) + 1
        figure = Figure(figsize=(4.4 * columns, 4.2), dpi=110, facecolor="white", layout="constrained")
        panels = figure.subplots(1, columns)
        for axes, each in zip(panels, found, strict=False):
            fit = each.fit
            steps = np.arange(fit.start, each.steps + 1)
            axes.set_title(
                f"{each.name}\nL0 = {fit.floor:.3f}, r² {fit.uniform.r_squared:.4f}, {fit.optimal.r_squared:.4f}"
            )
            for law, losses, color in zip((fit.uniform, fit.optimal), each.curves, (UNIFORM, SERVED), strict=True):
                axes.plot(steps, losses[steps] - fit.floor, color=color, linewidth=3, alpha=0.35)
                axes.plot(steps, (law.scale / steps) ** law.exponent, color=color, linestyle="--", linewidth=1.2)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("training step; loss − L0, nats, unseen")
            _tidy(axes)
        panels[-1].set_title("The same curves with another L0")
        for color, each in zip(PALETTE * 3, found, strict=False):
            floors = [other.floor for other in each.others]
            panels[-1].plot(floors, [other.exponent_change for other in each.others], color=color, marker="o")
            panels[-1].plot(
                floors, [other.acceleration - 1 for other in each.others], color=color, marker="s", linestyle=":"
            )
        panels[-1].set_xlabel("L0, nats; solid: change of β, dotted: acceleration − 1")
        _tidy(panels[-1])
        figure.savefig(path)


def _draw_curves(axes: Axes, run: FinishedRun) -> None:
    steps = np.arange(len(run.uniform.target_loss), dtype=np.float64)
    lines: list[tuple[Array, Array, str, str, str]] = [
        (steps, run.uniform.target_loss, UNIFORM, "--", "uniform, target"),
        (steps, run.uniform.test_loss, UNIFORM, "-", "uniform, unseen"),
        (steps, run.final.target_loss, SERVED, "--", "near-optimal, target"),
        (steps, run.final.test_loss, SERVED, "-", "near-optimal, unseen"),
        (run.matched.steps, run.matched.test_loss, MATCHED, ":", "norm-matched, unseen"),
    ]
    if run.online is not None:
        lines.append((run.online.steps, run.online.test_loss, ONLINE, "-.", "online ema_sign, unseen"))
    for where, losses, color, dash, label in lines:
        axes.plot(where[1:], losses[1:], color=color, linestyle=dash, linewidth=1.6, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("training step (nats)")
    _tidy(axes)


def _draw_sims(axes: Axes, measures: Sequence[Measures]) -> None:
    shown = sorted({*range(0, len(measures), max(1, len(measures) // 5)), len(measures) - 1})
    for place, index in enumerate(shown):
        each = measures[index]
        color = mpl.colormaps["viridis"](place / max(1, len(shown) - 1) * 0.85)
        axes.plot(each.looked, each.sim, color=color, linewidth=1.4, label=f"policy epoch {each.epoch}")
    axes.set_xlabel("training step")
    axes.legend(frameon=False, fontsize=8)


def _over(measures: Sequence[Measures], pick: Callable[[Measures], Array]) -> Array:
    mean: Array = np.mean([pick(each) for each in measures], axis=0)
    return mean


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _tidy(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
