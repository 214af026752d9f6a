"""The picture of an experiment with language models: test loss over compute units, and where the weight went."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equipoise_trainer.lm.experiment import ExperimentConfig
from equipoise_trainer.lm.methods import HEADLINE, METHODS
from equipoise_trainer.lm.recipes import SOURCES
from equipoise_trainer.lm.records import RunRecord
from equipoise_trainer.lm.summary import of
from equipoise_trainer.plots import FLIPPED, GRID, MUTED, SERVED, STYLE

COLORS = {
    "uniform": "#374151",
    "norm-matched": "#9ca3af",
    "target": "#e08e0b",
    "mixture": "#f0b429",
    "trim": "#b08968",
    "lin-upper": "#8d6e63",
    "rho": "#7b5ea7",
    "boltzmann": "#d1495b",
    "sign": "#56b4e9",
    "relu": "#0072b2",
    "buckets-relu": "#14b8a6",
    "buckets": SERVED,
    "unguarded": "#0e7490",
    "sources": "#6366f1",
    "oracle": "#2a9d5c",
}
SOURCE_COLORS = (SERVED, MUTED, FLIPPED)
"""Of `recipes.SOURCES`."""


def save_picture(runs: Sequence[RunRecord], config: ExperimentConfig, *, path: Path) -> None:
    """Writes a PNG of about 1950 × 1050 pixels."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # matplotlib's stubs name every key
        figure = Figure(figsize=(13, 7), dpi=150, facecolor="white")
        grid = figure.add_gridspec(
            1, 2, width_ratios=(1.5, 1), left=0.05, right=0.97, bottom=0.09, top=0.84, wspace=0.42
        )
        _draw_losses(figure.add_subplot(grid[0]), runs)
        _draw_shares(figure.add_subplot(grid[1]), runs)
        seeds = f"{len(config.seeds)} seeds · mean, lowest and highest" if len(config.seeds) > 1 else "one seed"
        name = "Python's documentation" if config.corpus is None else config.corpus.name
        figure.text(0.05, 0.945, f"Language model, {config.recipe}", fontsize=17, fontweight="bold", va="center")
        figure.text(
            0.05,
            0.9,
            f"{name} · {config.preset.name} preset · {config.steps} steps of {config.batch_size} sequences · {seeds}",
            fontsize=10.5,
            color=MUTED,
            va="center",
        )
        figure.savefig(path)


def _draw_losses(axes: Axes, runs: Sequence[RunRecord]) -> None:
    axes.set_title("Test loss, nats, over compute units")
    ends: list[tuple[float, str]] = []
    for name in METHODS:
        same = of(runs, name)
        if not same:
            continue
        units = np.mean([run.curve.units for run in same], axis=0)
        losses = np.array([run.curve.test_loss for run in same])
        bold = name == HEADLINE
        if bold or name == "uniform":
            axes.fill_between(units, losses.min(0), losses.max(0), color=COLORS[name], alpha=0.14, linewidth=0)
        axes.plot(units, losses.mean(0), color=COLORS[name], linewidth=2.6 if bold else 1.4, zorder=3 if bold else 2)
        ends.append((float(losses.mean(0)[-1]), name))
    top = max(float(np.mean([run.curve.test_loss[1] for run in of(runs, name)])) for _, name in ends)
    low = min(min(run.curve.test_loss) for run in runs)
    axes.set_ylim(low - 0.1, top)
    axes.set_xlim(0, 1.02 * max(run.curve.units[-1] for run in of(runs, ends[0][1])) * 1.6)
    axes.set_xlabel("compute units: plain steps")
    _finish(axes)
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: list[tuple[float, str]]) -> None:
    """Names the lines at the right, by their last loss, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    position = -1.0
    for value, name in sorted(ends):
        position = max((value - low) / (high - low), position + 0.04)
        axes.annotate(
            f"{METHODS[name].title}  {value:.3f}",
            (1.015, position),
            xycoords="axes fraction",
            color=COLORS[name],
            va="center",
            fontsize=9.5,
            fontweight="bold" if name == HEADLINE else "normal",
            annotation_clip=False,
        )


def _draw_shares(axes: Axes, runs: Sequence[RunRecord]) -> None:
    """Where the headline's weight went; of any other method with a policy if it was not run."""
    name = next((name for name in (HEADLINE, *METHODS) if of(runs, name)), HEADLINE)
    axes.set_title(f"Share of the weight by source: {METHODS[name].title}")
    curves = [run.curve for run in of(runs, name)]
    for index, source in enumerate(SOURCES):
        values = [[np.nan if each is None else each[index] for each in curve.shares[1:]] for curve in curves]
        steps = curves[0].step[1:]
        mean = np.mean(values, axis=0)
        axes.plot(steps, mean, color=SOURCE_COLORS[index], linewidth=2)
        axes.annotate(source, (steps[-1], mean[-1]), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(xmax=1))
    axes.set_xlabel("training step")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
