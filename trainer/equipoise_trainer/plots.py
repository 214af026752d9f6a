"""The picture of an experiment: losses to the left, what the policy did to the right."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equipoise_trainer.curves import Curve
from equipoise_trainer.experiment import ExperimentConfig, Run
from equipoise_trainer.methods import METHODS, TITLES, Method
from equipoise_trainer.perceptron import Array
from equipoise_trainer.summary import of, summarise

INK, MUTED, GRID = "#1b1f24", "#6b7280", "#e5e7eb"
SERVED, FLIPPED = "#0a66c2", "#d1495b"
COLORS: dict[Method, str] = {
    "uniform": "#374151",
    "uniform-tuned": "#9ca3af",
    "norm-matched": "#b08968",
    "target": "#e08e0b",
    "served": SERVED,
    "oracle": "#2a9d5c",
}
DASHES: dict[Method, str] = {"uniform-tuned": "--", "norm-matched": ":", "oracle": "--"}

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
}


def save_picture(runs: Sequence[Run], config: ExperimentConfig, *, path: Path) -> None:
    """Draws test losses, weights, effective examples and SIM, and writes a PNG of about 1950 × 1140 pixels."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # matplotlib's stubs name every key
        figure = Figure(figsize=(13, 7.6), dpi=150, facecolor="white")
        served = of(runs, "served")
        grid = figure.add_gridspec(
            3, 2, width_ratios=(1.3, 1), left=0.05, right=0.945, bottom=0.085, top=0.83, hspace=0.5, wspace=0.64
        )
        losses = figure.add_subplot(grid[:, 0] if served else grid[:, :])
        _draw_losses(losses, runs)
        if served:
            panels = [figure.add_subplot(grid[row, 1]) for row in range(3)]
            _draw_weights(panels[0], served)
            _draw_effective(panels[1], served)
            _draw_sim(panels[2], served)
        headline, detail = _headline(runs, config)
        figure.text(0.05, 0.945, headline, fontsize=17, fontweight="bold", va="center")
        figure.text(0.05, 0.9, detail, fontsize=10.5, color=MUTED, va="center")
        figure.savefig(path)


def _headline(runs: Sequence[Run], config: ExperimentConfig) -> tuple[str, str]:
    names = {"digits": "Handwritten digits", "paper": "Linear teacher", "paper-noisy": "Linear teacher, noisy margins"}
    labels = f"{100 * config.flipped:g} % of the labels flipped" if config.flipped else "clean labels"
    rows = {row.method: row.test_loss.mean for row in summarise(runs)}
    detail = f"{len(config.seeds)} seeds · mean, lowest and highest · " if len(config.seeds) > 1 else ""
    detail += "full batch" if config.batch_size is None else f"mini-batches of {config.batch_size}"
    if "served" in rows:
        detail += f" · rule {config.rule}"
        if "uniform" in rows:
            detail += f" · test loss {rows['uniform']:.3f} → {rows['served']:.3f} nats where guard B reads the runs off"
    return f"{names[config.dataset]}, {labels}", detail


def _draw_losses(axes: Axes, runs: Sequence[Run]) -> None:
    axes.set_title("Test loss, nats")
    ends: list[tuple[float, Method]] = []
    for method in METHODS:
        rows = of(runs, method)
        if not rows:
            continue
        mean = _band(axes, rows, lambda curve: curve.test_loss, color=COLORS[method], method=method)
        ends.append((float(mean[-1]), method))
    axes.set_yscale("log")
    highest = max(float(run.trained.curve.test_loss[0]) for run in runs)
    lowest = min(float(np.nanmin(run.trained.curve.test_loss)) for run in runs)
    axes.set_ylim(lowest * 0.88, highest * 1.08)
    axes.yaxis.set_major_locator(mpl.ticker.FixedLocator([0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3]))
    axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    _finish(axes, runs, label=True)
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: list[tuple[float, Method]]) -> None:
    """Names the lines at their ends, moved apart where they would overlap."""
    low, high = np.log(axes.get_ylim())
    gap = 0.036
    position = -1.0
    for value, method in sorted(ends):
        position = max((np.log(value) - low) / (high - low), position + gap)
        axes.annotate(
            f"{TITLES[method]}  {value:.3f}",
            (1.015, position),
            xycoords="axes fraction",
            color=COLORS[method],
            va="center",
            fontsize=9.5,
            fontweight="bold" if method == "served" else "normal",
            annotation_clip=False,
        )


def _draw_weights(axes: Axes, served: Sequence[Run]) -> None:
    axes.set_title("Weight of an example: median, 10 % to 90 %")
    groups: list[tuple[str, str, Callable[[Curve], Array]]] = [
        ("clean", SERVED, lambda curve: curve.clean_weights),
        ("flipped", FLIPPED, lambda curve: curve.flipped_weights),
    ]
    steps = served[0].trained.curve.steps
    for name, color, pick in groups:
        low, median, high = np.mean([pick(run.trained.curve) for run in served], axis=0).T
        if np.isnan(median).all():
            continue
        axes.fill_between(steps[1:], low[1:], high[1:], color=color, alpha=0.16, linewidth=0)
        axes.plot(steps[1:], median[1:], color=color, linewidth=2)
        axes.annotate(
            name,
            (1.015, median[-1]),
            xycoords=("axes fraction", "data"),
            color=color,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )
    highest = axes.get_ylim()[1]
    axes.set_ylim(-0.06 * highest, 1.06 * highest)
    _finish(axes, served)


def _draw_effective(axes: Axes, served: Sequence[Run]) -> None:
    axes.set_title("Effective examples, share of N")
    _band(axes, served, lambda curve: curve.effective_share, color=SERVED, method="served")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(xmax=1))
    _finish(axes, served)


def _draw_sim(axes: Axes, served: Sequence[Run]) -> None:
    axes.set_title("SIM: contributions' mean over deviation")
    _band(axes, served, lambda curve: curve.sim, color=SERVED, method="served", last=False)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    _finish(axes, served, label=True)


def _band(
    axes: Axes,
    runs: Sequence[Run],
    pick: Callable[[Curve], Array],
    *,
    color: str,
    method: Method,
    last: bool = True,
) -> Array:
    """Mean over seeds as a line, lowest to highest as a band, from step 1; returns the mean."""
    steps = runs[0].trained.curve.steps
    values = np.array([pick(run.trained.curve) for run in runs])
    kept = slice(1, None if last else -1)  # step 0 has no place on a logarithmic axis
    mean: Array = values.mean(axis=0)
    low, high = values.min(axis=0), values.max(axis=0)
    opacity = 0.16 if method == "served" else 0.1
    axes.fill_between(steps[kept], low[kept], high[kept], color=color, alpha=opacity, linewidth=0)
    axes.plot(
        steps[kept],
        mean[kept],
        color=color,
        linestyle=DASHES.get(method, "-"),
        linewidth=2.6 if method == "served" else 1.7,
        zorder=3 if method == "served" else 2,
    )
    return mean


def _finish(axes: Axes, runs: Sequence[Run], *, label: bool = False) -> None:
    axes.set_xscale("log")
    axes.set_xlim(1, int(runs[0].trained.curve.steps[-1]))
    axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%d"))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    if label:
        axes.set_xlabel("training step")
