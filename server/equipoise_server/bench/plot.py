"""The picture of a run: ratios to the echo with the goals, and how busy each process was."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise_server.bench.result import Ratio, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LATENCY_GOALS = {"logged": 3.0, "behind": 2.0}
"""p50 of a step over the echo's, at most."""
RATE_GOAL = 0.4
"""Steps per second over the echo's, at least."""
FLAT_GOAL = 1.2
"""p50 over that with the fewest examples, at most."""
COLORS = {"echo": "#6b7280", "logged": "#0a66c2", "behind": "#e08e0b", "reverb": "#d1495b"}
MARKERS = "osD^vP*X"
DASHES = ("-", "--", ":", "-.")
PARTS = {"server": "#0a66c2", "redis": "#d1495b", "client": "#9ca3af"}

DIMENSIONS: dict[str, Callable[[Result], Any]] = {
    "rows of a step": lambda result: result.case.rows,
    "examples of the policy": lambda result: result.num_examples,
    "trainers": lambda result: result.case.trainers,
    "processes": lambda result: result.processes,
    "values of a sketch": lambda result: result.case.sketch,
    "rule": lambda result: result.case.rule,
}
"""What may vary in a run, by its name on an axis."""


class NoPlotError(Exception):
    """There is no picture; the message says why."""


def save_plot(results: Sequence[Result], path: Path) -> None:
    """Draws medians with quartiles, the echo at 1, the goals, and the cores that each process kept busy.

    Raises NoPlotError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NoPlotError("matplotlib is not installed: pip install 'equipoise[trainer]'") from None
    modes = [mode for mode in (False, True) if any(each.case.pipelined == mode for each in results)]
    axis = _axis(results)
    figure = Figure(figsize=(7.5 * len(modes), 9.5), dpi=110, layout="constrained", facecolor="white")
    panels = figure.subplots(2, len(modes), squeeze=False)
    for column, pipelined in enumerate(modes):
        told = [each for each in results if each.case.pipelined == pipelined]
        _draw_ratios(panels[0, column], told, axis, pipelined=pipelined)
        _draw_cores(panels[1, column], told, axis)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(path)


def _axis(results: Sequence[Result]) -> str:
    """What has most different values; the others tell lines apart."""
    others = [each for each in results if each.contender != "echo"] or list(results)
    return max(DIMENSIONS, key=lambda name: len({DIMENSIONS[name](each) for each in others}))


def _lines(results: Sequence[Result], axis: str) -> dict[str, list[Result]]:
    """Results by the name of their line, each in the order of the axis."""
    told = [name for name in DIMENSIONS if name != axis and len({DIMENSIONS[name](each) for each in results}) > 1]
    lines: dict[str, list[Result]] = {}
    for each in results:
        name = [each.contender, *([each.via] if each.contender not in ("echo", "reverb") else [])]
        name += [each.security] if each.security != "plain" else []
        apart = [f"{DIMENSIONS[what](each)} {what.split()[0]}" for what in told if each.contender != "echo"]
        lines.setdefault(", ".join(name + apart), []).append(each)
    return lines


def _draw_ratios(panel: "Axes", results: Sequence[Result], axis: str, *, pipelined: bool) -> None:
    compared = [each for each in results if each.contender != "echo"]
    places = _places(panel, compared, axis)
    panel.axhline(1, color=COLORS["echo"], linewidth=1)
    panel.annotate("echo", (1, 1), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=COLORS["echo"])
    goals = {"goal": RATE_GOAL} if pipelined else {f"goal, {name}": value for name, value in LATENCY_GOALS.items()}
    for name, goal in goals.items():
        color = COLORS.get(name.removeprefix("goal, "), "#2a9d5c")
        panel.axhline(goal, color=color, linewidth=1, linestyle=(0, (6, 3)))
        panel.annotate(name, (0, goal), xycoords=("axes fraction", "data"), va="bottom", color=color)
    for number, (name, line) in enumerate(_lines(compared, axis).items()):
        ratios = [each.rate_ratio if pipelined else each.latency_ratio for each in line]
        color = COLORS[line[0].contender]
        dash, marker = DASHES[number // len(MARKERS) % len(DASHES)], MARKERS[number % len(MARKERS)]
        at = [places[DIMENSIONS[axis](each)] for each in line]
        _errorbar(panel, at, [each for each in ratios if each], name, color=color, linestyle=dash, marker=marker)
        if axis == "examples of the policy" and not pipelined and ratios[0]:
            panel.axhline(FLAT_GOAL * ratios[0].median, color=color, linewidth=0.8, linestyle=":")
    panel.set_yscale("log")
    panel.set_title("pipelined: steps/s over the echo's" if pipelined else "one in flight: p50 over the echo's")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    panel.grid(axis="y", color="#e5e7eb")


def _errorbar(panel: "Axes", at: Sequence[float], ratios: Sequence[Ratio], name: str, **style: Any) -> None:
    below = [each.median - each.low for each in ratios]
    above = [each.high - each.median for each in ratios]
    panel.errorbar(
        at, [each.median for each in ratios], yerr=(below, above), label=name, capsize=3, markersize=5, **style
    )


def _draw_cores(panel: "Axes", results: Sequence[Result], axis: str) -> None:
    """A line at one core: a process of Python cannot do more than about that; who is there is what bounds the case."""
    compared = [each for each in results if each.contender != "echo"]
    places = _places(panel, compared, axis)
    for number, line in enumerate(_lines(compared, axis).values()):
        at = [places[DIMENSIONS[axis](each)] for each in line]
        dash, marker = DASHES[number // len(MARKERS) % len(DASHES)], MARKERS[number % len(MARKERS)]
        for part, color in PARTS.items():
            busy = [each.cores[part] / (each.processes if part == "server" else 1) for each in line]
            label = part if number == 0 else None
            panel.plot(at, busy, color=color, linestyle=dash, marker=marker, markersize=4, alpha=0.8, label=label)
    panel.axhline(1, color="#1b1f24", linewidth=1, linestyle=(0, (6, 3)))
    panel.annotate("saturated: one core a process", (0, 1), xycoords=("axes fraction", "data"), va="bottom")
    panel.set_ylim(bottom=0)
    panel.set_title("cores that each process kept busy; markers as above")
    panel.grid(axis="y", color="#e5e7eb")
    panel.legend(fontsize="small", framealpha=0.8)


def _places(panel: "Axes", results: Sequence[Result], axis: str) -> dict[Any, float]:
    """Where a value stands on the axis: numbers on a logarithmic one, as they are; names side by side."""
    values = sorted({DIMENSIONS[axis](each) for each in results})
    panel.set_xlabel(axis)
    if axis == "rule" or 0 in values:
        panel.set_xticks(range(len(values)), [str(each) for each in values], rotation=60 if axis == "rule" else 0)
        return {value: float(place) for place, value in enumerate(values)}
    panel.set_xscale("log")
    panel.set_xticks(values, [f"{value:g}" if value < 1e5 else f"{value:.0e}" for value in values])
    panel.minorticks_off()
    return {value: float(value) for value in values}
