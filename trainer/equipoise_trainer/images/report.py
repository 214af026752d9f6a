"""The report of an experiment with images: a table, `report.json` and `report.png`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from equipoise_trainer.images.data import GUARD, TARGET, TEST
from equipoise_trainer.images.runs import TITLES, ExperimentConfig, Run
from equipoise_trainer.images.served import RULES
from equipoise_trainer.plots import STYLE
from equipoise_trainer.provenance import finite, machine, versions
from equipoise_trainer.report import ReportFiles
from equipoise_trainer.summary import Spread

FORMAT = 1
"""Version of the layout of `report.json`."""
COLORS = (
    "#374151", "#0a66c2", "#be185d", "#d1495b", "#e08e0b", "#b08968", "#0f766e", "#9d4edd", "#9ca3af", "#2a9d5c",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSummary:
    """One method over all seeds; losses in nats.

    Attributes:
        method: which.
        accuracy: on unseen images, in [0, 1].
        loss: on unseen images.
        minus_uniform: by seed, this loss minus uniform's; negative is better. Empty without uniform.
        accuracy_minus_uniform: the same of accuracies; positive is better.
        auroc: of finding wrong labels, by seed; empty where there is nothing to be found.
        cost: CPU seconds as a multiple of uniform's, in the mean; None without uniform.
        seconds: wall-clock time of one run.
    """

    method: str
    accuracy: Spread
    loss: Spread
    minus_uniform: tuple[float, ...]
    accuracy_minus_uniform: tuple[float, ...]
    auroc: tuple[float, ...]
    cost: float | None
    seconds: float


def summarise(runs: Sequence[Run]) -> list[MethodSummary]:
    """One row per method, in the order of the table; differences are paired by seed."""
    by_seed = {run.seed: run for run in runs if run.method == "uniform"}
    return [_row(same, by_seed) for name in TITLES if (same := [run for run in runs if run.method == name])]


def _row(runs: Sequence[Run], uniform: dict[int, Run]) -> MethodSummary:
    pairs = [(run, uniform[run.seed]) for run in runs if run.seed in uniform]
    spent = sum(theirs.cpu_seconds for _, theirs in pairs)
    return MethodSummary(
        method=runs[0].method,
        accuracy=Spread.of([run.test.accuracy for run in runs]),
        loss=Spread.of([run.test.loss for run in runs]),
        minus_uniform=tuple(run.test.loss - theirs.test.loss for run, theirs in pairs),
        accuracy_minus_uniform=tuple(run.test.accuracy - theirs.test.accuracy for run, theirs in pairs),
        auroc=tuple(run.auroc for run in runs if np.isfinite(run.auroc)),
        cost=sum(run.cpu_seconds for run, _ in pairs) / spent if spent else None,
        seconds=float(np.mean([run.seconds for run in runs])),
    )


def describe(config: ExperimentConfig) -> str:
    """The experiment in words."""
    wrong = f"{100 * config.share:g} % of the labels wrong ({config.noise})" if config.share else "no label wrong"
    return (
        f"CNN on digits, {wrong}, {config.epochs} epochs; "
        f"{TARGET} trusted images, {len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}"
    )


def table(rows: Sequence[MethodSummary], config: ExperimentConfig) -> Table:
    """One row per method."""
    result = Table(
        title=describe(config),
        caption="unseen images after the last epoch, means over seeds; % and nats;\n"
        "AUROC: of finding wrong labels; CPU: seconds over uniform's",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("method", no_wrap=True)
    for heading in ("accuracy", "loss", "−uniform's", "better in", "AUROC", "CPU"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            TITLES[row.method],
            f"{100 * row.accuracy.mean:.1f}",
            f"{row.loss.mean:.3f}",
            "" if row.method == "uniform" else _mean(row.minus_uniform, "{:+.3f}"),
            "" if row.method == "uniform" else _better(row.minus_uniform),
            _mean(row.auroc, "{:.3f}"),
            "" if row.cost is None else f"{row.cost:.1f}×",
            style="bold green" if row.method in RULES else "",
        )
    return result


def _mean(values: Sequence[float], form: str) -> str:
    return form.format(sum(values) / len(values)) if values else ""


def _better(differences: Sequence[float]) -> str:
    return f"{sum(value < 0 for value in differences)} of {len(differences)}" if differences else ""


def print_report(runs: Sequence[Run], config: ExperimentConfig, *, console: Console) -> None:
    """The table."""
    console.print(table(summarise(runs), config))


def save_report(runs: Sequence[Run], config: ExperimentConfig, *, directory: Path, server: str) -> ReportFiles:
    """Writes `report.json` and `report.png` into `directory`, which is made if need be.

    Args:
        runs: of all methods and seeds.
        config: what was run.
        directory: where to.
        server: what the policy server was, in words.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = ReportFiles(data=directory / "report.json", picture=directory / "report.png")
    document = finite(to_json(runs, config, server=server))
    files.data.write_text(json.dumps(document, allow_nan=False, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    save_picture(runs, config, path=files.picture)
    return files


def to_json(runs: Sequence[Run], config: ExperimentConfig, *, server: str) -> dict[str, Any]:
    """The whole report; losses in nats."""
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "server": server,
        "machine": machine(),
        "versions": versions(),
        "config": asdict(config),
        "images": {"target": TARGET, "guard": GUARD, "test": TEST},
        "summary": [asdict(row) for row in summarise(runs)],
        "runs": [asdict(run) for run in runs],
    }


def save_picture(runs: Sequence[Run], config: ExperimentConfig, *, path: Path) -> None:
    """Draws test losses by epoch, and accuracy and the AUROC of each seed; a PNG of about 1950 × 900 pixels."""
    rows = summarise(runs)
    colors = dict(zip(TITLES, COLORS, strict=True))
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # matplotlib's stubs name every key
        figure = Figure(figsize=(13, 6), dpi=150, facecolor="white", layout="constrained")
        curves, accuracies, areas = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
        figure.suptitle(describe(config), x=0.01, ha="left", fontweight="bold")
        for row in rows:
            losses = np.mean([[each.loss for each in run.curve] for run in runs if run.method == row.method], axis=0)
            wide = 2.2 if row.method in RULES else 1.2
            curves.plot(range(1, len(losses) + 1), losses, color=colors[row.method], lw=wide, label=TITLES[row.method])
        curves.xaxis.set_major_locator(MaxNLocator(integer=True))
        curves.set(title="test loss, nats, mean over seeds", xlabel="epoch", yscale="log")
        curves.legend(frameon=False, fontsize=8)
        places = range(len(rows), 0, -1)
        measured = {
            accuracies: ("accuracy, %", [100 * run.test.accuracy for run in runs]),
            areas: ("AUROC of wrong labels", [run.auroc for run in runs]),
        }
        for axes, (title, numbers) in measured.items():
            for place, row in zip(places, rows, strict=True):
                values = [number for run, number in zip(runs, numbers, strict=True) if run.method == row.method]
                axes.plot(values, [place] * len(values), "o", color=colors[row.method], ms=5)
                axes.plot([np.mean(values)], [place], "|", color=colors[row.method], ms=16, mew=2)
            axes.set(title=title, yticks=list(places))
            axes.set_yticklabels([TITLES[row.method] for row in rows] if axes is accuracies else [])
        figure.savefig(path)
