"""The picture of the scaling law: what was fitted (cf. Figure 11), and what another L0 does to the fit."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equipoise_trainer.plots import SERVED
from equipoise_trainer.reproduction.figures import PAGE_STYLE, PALETTE, UNIFORM, plain_logarithms, tidy
from equipoise_trainer.reproduction.scaling import ScalingFound


def save_scaling(found: Sequence[ScalingFound], *, path: Path) -> None:
    """A panel for each family of runs, and one for other L0."""
    columns = min(3, len(found) + 1)
    lines = -(-(len(found) + 1) // columns)
    with mpl.rc_context(PAGE_STYLE):  # type: ignore[arg-type]  # matplotlib's stubs name every key
        size = (4.6 * columns, 3.6 * lines)
        figure = Figure(figsize=size, dpi=110, facecolor="white", layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, each in zip(panels, found, strict=False):
            _draw_fit(axes, each)
        _draw_floors(panels[len(found)], found)
        for axes in panels[len(found) + 1 :]:
            axes.set_visible(False)
        figure.savefig(path)


def _draw_fit(axes: Axes, found: ScalingFound) -> None:
    fit = found.fit
    steps = np.arange(fit.start, found.steps + 1)
    axes.set_title(
        f"{found.name}\nL0 = {fit.floor:.3f}, r² {fit.uniform.r_squared:.4f} and {fit.optimal.r_squared:.4f}"
    )
    named = zip((fit.uniform, fit.optimal), found.curves, (UNIFORM, SERVED), ("uniform", "near-optimal"), strict=True)
    for law, losses, color, name in named:
        axes.plot(steps, losses[steps] - fit.floor, color=color, linewidth=3, alpha=0.35, label=name)
        axes.plot(steps, (law.scale / steps) ** law.exponent, color=color, linestyle="--", linewidth=1.2, label="law")
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_logarithms(axes.xaxis)
    plain_logarithms(axes.yaxis, every=True)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss − L0, nats, unseen")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    tidy(axes)


def _draw_floors(axes: Axes, found: Sequence[ScalingFound]) -> None:
    axes.set_title("The same curves with another L0\nsolid: change of β; dotted: acceleration − 1")
    for color, each in zip(PALETTE * 3, found, strict=False):
        floors = [other.floor for other in each.others]
        betas = [other.exponent_change for other in each.others]
        gains = [other.acceleration - 1 for other in each.others]
        axes.plot(floors, betas, color=color, marker="o", markersize=4, label=each.name)
        axes.plot(floors, gains, color=color, marker="s", markersize=4, linestyle=":")
    axes.set_xlabel("L0, nats")
    axes.set_ylabel("share")
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
