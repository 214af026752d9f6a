"""The report of an experiment with prompts: a table, `report.json` and `report.png`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import matplotlib as mpl
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from equipoise_trainer.plots import STYLE
from equipoise_trainer.prompts.runs import SERVED, TITLES, ExperimentConfig, Run
from equipoise_trainer.prompts.task import JOBS
from equipoise_trainer.provenance import finite, machine, versions
from equipoise_trainer.report import ReportFiles

FORMAT = 1
"""Version of the layout of `report.json`."""
COLORS = ("#374151", "#d1495b", "#0a66c2", "#7c3aed", "#2a9d5c")


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSummary:
    """One method at one learning rate, over all seeds.

    Attributes:
        learning_rate: of SGD.
        method: which.
        steps: to the target, median; None: fewer than half of the seeds reached it.
        completions: the same, of those that were generated.
        speedup: uniform's completions over this method's, by seed; None where one of them did not reach the target.
        useful: share of groups whose rewards differed, mean.
    """

    learning_rate: float
    method: str
    steps: float | None
    completions: float | None
    speedup: tuple[float | None, ...]
    useful: float


def summarise(runs: Sequence[Run], config: ExperimentConfig) -> list[MethodSummary]:
    """One row per learning rate and method; speedups are paired by seed."""
    found = {(run.learning_rate, run.method, run.seed): run for run in runs}
    rows = []
    for rate in config.learning_rates:
        for method in (name for name in TITLES if name in config.methods):
            same = [found[rate, method, seed] for seed in config.seeds]
            others = [found.get((rate, "uniform", seed)) for seed in config.seeds]
            rows.append(
                MethodSummary(
                    learning_rate=rate,
                    method=method,
                    steps=_median([run.steps for run in same]),
                    completions=_median([run.completions for run in same]),
                    speedup=tuple(
                        other.completions / run.completions
                        if other is not None and other.completions and run.completions
                        else None
                        for run, other in zip(same, others, strict=True)
                    ),
                    useful=sum(run.useful for run in same) / len(same),
                )
            )
    return rows


def describe(config: ExperimentConfig) -> str:
    """The experiment in words."""
    job = JOBS[config.job]
    return (
        f"GRPO on {job.prompts} prompts ({job.about}), {config.batch} × {config.group} completions a batch; "
        f"to a success rate of {config.target:g}; {len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}"
    )


def print_report(runs: Sequence[Run], config: ExperimentConfig, *, console: Console) -> None:
    """The table."""
    table = Table(
        title=describe(config),
        caption="medians over seeds; saves: uniform's completions over these, by seed;\n"
        "useful: share of the groups whose rewards differed",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("rate", justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for heading in ("steps", "completions", "saves", "useful"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summarise(runs, config):
        table.add_row(
            f"{row.learning_rate:g}",
            TITLES[row.method],
            "–" if row.steps is None else f"{row.steps:.0f}",
            "–" if row.completions is None else f"{row.completions:,.0f}",
            "" if row.method == "uniform" else " ".join("–" if x is None else f"{x:.2f}" for x in row.speedup),
            f"{100 * row.useful:.0f} %",
            style="bold green" if row.method in SERVED else "",
        )
    console.print(table)


def save_report(runs: Sequence[Run], config: ExperimentConfig, *, directory: Path, server: str) -> ReportFiles:
    """Writes `report.json` and `report.png` into `directory`, which is made if need be.

    Args:
        runs: of all methods, rates and seeds.
        config: what was run.
        directory: where to.
        server: what the policy server was, in words.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = ReportFiles(data=directory / "report.json", picture=directory / "report.png")
    document = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "server": server,
        "machine": machine(),
        "versions": versions(),
        "config": asdict(config),
        "summary": [asdict(row) for row in summarise(runs, config)],
        "runs": [asdict(run) for run in runs],
    }
    text = json.dumps(finite(document), allow_nan=False, ensure_ascii=False, indent=1)
    files.data.write_text(text + "\n", encoding="utf-8")
    save_picture(runs, config, path=files.picture)
    return files


def save_picture(runs: Sequence[Run], config: ExperimentConfig, *, path: Path) -> None:
    """Draws the success rate of each run by completions, a panel for each learning rate."""
    colors = dict(zip(TITLES, COLORS, strict=True))
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # matplotlib's stubs name every key
        count = len(config.learning_rates)
        figure = Figure(figsize=(2 + 5 * count, 5), dpi=150, facecolor="white", layout="constrained")
        panels = figure.subplots(1, count, squeeze=False)[0]
        figure.suptitle(describe(config), x=0.01, ha="left", fontweight="bold", fontsize=9)
        for panel, rate in zip(panels, config.learning_rates, strict=True):
            named: set[str] = set()
            for run in (run for run in runs if run.learning_rate == rate):
                _, completions, success = zip(*run.curve, strict=True) if run.curve else ((), (), ())
                label = None if run.method in named else TITLES[run.method]
                panel.plot(completions, success, color=colors[run.method], lw=1.2, label=label)
                named.add(run.method)
            panel.set(title=f"learning rate {rate:g}", xlabel="completions", ylabel="success rate")
            panel.legend(frameon=False, fontsize=7)
        figure.savefig(path)


def _median(values: Sequence[int | None]) -> float | None:
    """The median, where what is missing counts as the largest."""
    middle = median([float("inf") if value is None else value for value in values])
    return None if middle == float("inf") else middle
