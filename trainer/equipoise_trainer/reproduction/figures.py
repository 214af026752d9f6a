"""Pictures that stand beside the paper's figures: losses, the Learning Law, and what gets no weight."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from equipoise_trainer.offline.measures import BINS, Measures
from equipoise_trainer.perceptron import Array
from equipoise_trainer.plots import FLIPPED, GRID, MUTED, SERVED, STYLE
from equipoise_trainer.reproduction.claims import faster
from equipoise_trainer.reproduction.findings import LOW, compressions, find, median, sims
from equipoise_trainer.reproduction.runs import FinishedRun

Runs: TypeAlias = Mapping[str, Sequence[FinishedRun]]
"""Finished runs by study, by seed."""

Titles: TypeAlias = Mapping[str, str]
"""What studies are called."""

UNIFORM, MATCHED, ONLINE = "#374151", "#b08968", "#e08e0b"
PALETTE = (SERVED, FLIPPED, "#2a9d5c", "#e08e0b", "#7c3aed", "#0891b2", "#374151")
PAGE_STYLE = {**STYLE, "axes.titlesize": 9.5, "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5}

COMPRESSION = "compression ratio on target, ln|V| / nats"


def save_curves(runs: Runs, titles: Titles, *, reference_nats: float, path: Path) -> None:
    """Losses of the first seed of each study: uniform, near-optimal, norm-matched and online."""
    columns = min(4, len(runs))
    lines = -(-len(runs) // columns)
    with mpl.rc_context(PAGE_STYLE):  # type: ignore[arg-type]  # matplotlib's stubs name every key
        figure = _figure(width=4.3 * columns if columns > 1 else 6.4, height=3.4 * lines + 0.9)
        panels = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
        for axes, (name, seeds) in zip(panels, runs.items(), strict=False):
            found = [find(run, reference_nats=reference_nats) for run in seeds]
            target, test = (median([each.accelerations[split] for each in found]) for split in (0, 1))
            axes.set_title(
                f"{titles.get(name, name)}\n{faster(target)} target, {faster(test)} unseen ({_seeds(seeds)})"
            )
            _draw_curves(axes, seeds[0])
        for axes in panels[len(runs) :]:
            axes.set_visible(False)
        # The panel that shows most kinds of runs names them.
        fullest = max(panels[: len(runs)], key=lambda axes: len(axes.lines))
        _legend(figure, fullest, columns=6 if columns > 1 else 2)
        figure.savefig(path)


def save_law(runs: Runs, titles: Titles, *, reference_nats: float, shown: str, path: Path) -> None:
    """The Learning Law: area over policy epochs, SIM against compression (Figure 7), SIM_t of study `shown`."""
    with mpl.rc_context(PAGE_STYLE):  # type: ignore[arg-type]
        figure = _figure(width=13, height=4.9)
        area, law, along = figure.subplots(1, 3)
        area.set_title("Area under the target-loss curve over policy epochs")
        law.set_title("SIM against compression ratio (cf. Figure 7)")
        along.set_title(f"SIM over steps: {shown}, seed {runs[shown][0].seed}")
        for color, (name, seeds) in zip(PALETTE * 3, runs.items(), strict=False):
            for run in seeds:
                epochs = np.array([each.epoch for each in run.measures])
                areas = np.array([each.area for each in run.measures])
                label = titles.get(name, name) if run is seeds[0] else None
                area.plot(epochs / epochs[-1], areas / areas[0], color=color, linewidth=1.2, label=label)
                ratios = compressions(run, reference_nats=reference_nats)
                law.plot(ratios, sims(run), color=color, marker="o", markersize=3, linewidth=1)
        area.set_xlabel("policy epoch, share of all")
        area.set_ylabel("area, uniform policy = 1")
        area.set_ylim(0, 1.05 * max(line.get_ydata().max() for line in area.lines))
        law.set_xlabel(COMPRESSION)
        law.set_ylabel("SIM, mean over steps")
        law.set_yscale("log")
        plain_logarithms(law.yaxis)
        _draw_sims(along, runs[shown][0].measures)
        for axes in (area, law, along):
            tidy(axes)
        _legend(figure, area, columns=4)
        figure.savefig(path)


def save_zeros(runs: Runs, titles: Titles, *, reference_nats: float, wrong: str, path: Path) -> None:
    """What gets no weight: Figures 8 to 10, and examples with a planted fault, which `wrong` names."""
    learned = any(run.final.learned.sum() for seeds in runs.values() for run in seeds)
    faulty = any(seeds[0].planted.flipped.any() for seeds in runs.values())
    with mpl.rc_context(PAGE_STYLE):  # type: ignore[arg-type]
        figure = _figure(width=4 * (2 + learned + faulty), height=4.7)
        panels = iter(figure.subplots(1, 2 + learned + faulty))
        first = next(panels)
        _draw_nonpositive(first, runs, titles, reference_nats=reference_nats)
        if learned:
            _draw_learned(next(panels), runs)
        _draw_positive(next(panels), runs)
        if faulty:
            _draw_faulty(next(panels), runs, wrong)
        for axes in figure.axes:
            axes.set_ylim(-0.02, 1.02)
            tidy(axes)
        _legend(figure, first, columns=4)
        figure.savefig(path)


def _draw_curves(axes: Axes, run: FinishedRun) -> None:
    steps = np.arange(len(run.uniform.target_loss), dtype=np.float64)
    lines: list[tuple[Array, Array, str, str, str]] = [
        (steps, run.uniform.target_loss, UNIFORM, "--", "uniform, target"),
        (steps, run.uniform.test_loss, UNIFORM, "-", "uniform, unseen"),
        (steps, run.final.target_loss, SERVED, "--", "near-optimal, target"),
        (steps, run.final.test_loss, SERVED, "-", "near-optimal, unseen"),
        (run.matched.steps, run.matched.test_loss, MATCHED, ":", "norm-matched uniform, unseen"),
    ]
    if run.online is not None:
        lines.append((run.online.steps, run.online.test_loss, ONLINE, "-.", "online ema_sign, unseen"))
    for where, losses, color, dash, label in lines:
        axes.plot(where[1:], losses[1:], color=color, linestyle=dash, linewidth=1.5, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_logarithms(axes.xaxis, ticks=(1.0, 3.0))
    plain_logarithms(axes.yaxis, every=True)
    axes.set_xlabel("training step")
    axes.set_ylabel(f"loss, nats (seed {run.seed})")
    tidy(axes)


def _draw_sims(axes: Axes, measures: Sequence[Measures]) -> None:
    shown = sorted({*range(0, len(measures), max(1, len(measures) // 5)), len(measures) - 1})
    for place, index in enumerate(shown):
        each = measures[index]
        color = mpl.colormaps["viridis"](place / max(1, len(shown) - 1) * 0.85)
        axes.plot(each.looked, each.sim, color=color, linewidth=1.4, label=f"policy epoch {each.epoch}")
    axes.set_xlabel("training step")
    axes.set_ylabel("SIM_t")
    axes.legend(frameon=False, fontsize=8)


def _draw_nonpositive(axes: Axes, runs: Runs, titles: Titles, *, reference_nats: float) -> None:
    axes.set_title("Zero weights among CT ≤ 0 (cf. Figure 8)")
    axes.set_xlabel(COMPRESSION)
    axes.set_ylabel("share with weight 0, mean over steps")
    for color, (name, seeds) in zip(PALETTE * 3, runs.items(), strict=False):
        for run in seeds:
            shares = [float(np.nanmean(each.zero_nonpositive)) for each in run.measures]
            ratios = compressions(run, reference_nats=reference_nats)
            label = titles.get(name, name) if run is seeds[0] else None
            axes.plot(ratios, shares, color=color, marker="o", markersize=3, linewidth=1, label=label)


def _draw_learned(axes: Axes, runs: Runs) -> None:
    axes.set_title("Weights of learned examples (cf. Figure 9)")
    axes.set_xlabel("weight / largest weight of its row")
    axes.set_ylabel("share of examples with loss < 1e-6, cumulative")
    for color, seeds in zip(PALETTE * 3, runs.values(), strict=False):
        learned = np.sum([run.final.learned for run in seeds], axis=0)
        if learned.sum():
            axes.plot(np.arange(1, BINS + 1) / BINS, np.cumsum(learned) / learned.sum(), color=color)
    axes.axvline(LOW, color=MUTED, linewidth=0.8)


def _draw_positive(axes: Axes, runs: Runs) -> None:
    axes.set_title("Zero weights among CT > 0 (cf. Figure 10)")
    axes.set_ylabel("share with weight 0")
    axes.set_xlabel("training step + 1")
    axes.set_xscale("log")
    plain_logarithms(axes.xaxis, ticks=(1.0, 3.0))
    for color, seeds in zip(PALETTE * 3, runs.values(), strict=False):
        final = [run.final for run in seeds]
        axes.plot(
            1 + final[0].looked, _over(final, lambda each: each.zero_positive), color=color, marker=".", markersize=3
        )


def _draw_faulty(axes: Axes, runs: Runs, wrong: str) -> None:
    axes.set_title(f"Zero weights:\n{wrong} (thick), clean (thin)")
    axes.set_ylabel("share with weight 0")
    axes.set_xlabel("training step")
    for color, seeds in zip(PALETTE * 3, runs.values(), strict=False):
        if seeds[0].planted.flipped.any():
            final = [run.final for run in seeds]
            axes.plot(final[0].looked, _over(final, lambda each: each.zero_flipped), color=color, linewidth=2.2)
            axes.plot(final[0].looked, _over(final, lambda each: each.zero_clean), color=color, linewidth=0.9)


def _over(measures: Sequence[Measures], pick: Callable[[Measures], Array]) -> Array:
    mean: Array = np.mean([pick(each) for each in measures], axis=0)
    return mean


def _seeds(runs: Sequence[FinishedRun]) -> str:
    return "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"


def _figure(*, width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")


def _legend(figure: Figure, axes: Axes, *, columns: int) -> None:
    """Below all panels, where it hides no line."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def plain_logarithms(axis: Axis, *, every: bool = False, ticks: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """1000 and 0.3 in place of powers of ten; `every`: at all ticks, where an axis spans less than a decade."""
    if every:
        axis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%g"))
        axis.set_tick_params(which="minor", labelsize=7)
    else:
        axis.set_major_locator(mpl.ticker.LogLocator(subs=ticks))
        axis.set_minor_formatter(mpl.ticker.NullFormatter())
    axis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))


def tidy(axes: Axes) -> None:
    """A grid behind the lines, and no ticks."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)
