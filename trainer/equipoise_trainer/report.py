"""The report of an experiment: a table on the terminal, `report.json` and `report.png`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from equipoise_trainer.experiment import ExperimentConfig, Run
from equipoise_trainer.methods import TITLES
from equipoise_trainer.plots import save_picture
from equipoise_trainer.provenance import finite, machine, versions
from equipoise_trainer.summary import MethodSummary, ServedSummary, summarise, summarise_served

FORMAT = 1
"""Version of the layout of `report.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFiles:
    """Where a report lies."""

    data: Path
    picture: Path


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
    document = to_json(runs, config, server=server)
    files.data.write_text(json.dumps(document, allow_nan=False, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    save_picture(runs, config, path=files.picture)
    return files


def to_json(runs: Sequence[Run], config: ExperimentConfig, *, server: str) -> dict[str, Any]:
    """The whole report; losses in nats, arithmetic in float64. What is not finite is None, since JSON has no NaN."""
    served = summarise_served(runs)
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "server": server,
        "machine": machine(),
        "versions": versions(),
        "precision": "float64; statistics and weights travel as float32",
        "config": asdict(config),
        "summary": [finite(asdict(row)) for row in summarise(runs)],
        "served": None if served is None else finite(asdict(served)),
        "runs": [_run(run) for run in runs],
    }


def table(rows: Sequence[MethodSummary], config: ExperimentConfig) -> Table:
    """One row per method; `beaten`: the seeds in which the served policy has the lower test loss. Fits 80 columns."""
    result = Table(
        title=describe(config),
        caption=f"{_count(config)}; nats, at the step of lowest guard loss",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("method", no_wrap=True)
    for heading in ("η", "test loss", "accuracy", "at step", "final", "beaten"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            f"served ({config.rule})" if row.method == "served" else TITLES[row.method],
            _span(row.learning_rates),
            f"{row.test_loss:.3f}",
            f"{100 * row.test_accuracy.mean:.1f} %",
            _span(row.chosen_steps),
            f"{row.final_test_loss.mean:.3f}",
            "" if row.served_wins is None else f"{row.served_wins}/{len(config.seeds)}",
            style="bold green" if row.method == "served" else "",
        )
    return result


def sentences(served: ServedSummary) -> list[str]:
    """What is said of the served policy below the table."""
    lines: list[str] = []
    areas = [area for area in served.auroc if area is not None]
    if areas:
        lines.append(f"Flipped labels found from the scores: AUROC {sum(areas) / len(areas):.3f}")
        shares = served.flipped_share
        lines[-1] += f"; they keep {100 * sum(shares) / len(shares):.1f} % of weight."
    effective = served.effective_share
    lines.append(f"Effective examples at the end: {100 * sum(effective) / len(effective):.0f} % of N.")
    if served.reached_at and served.uniform_best_step:
        pairs = [
            f"{'never' if reached is None else reached}/{best}"
            for reached, best in zip(served.reached_at, served.uniform_best_step, strict=True)
        ]
        lines.append(f"Steps to uniform's best loss, served/uniform: {', '.join(pairs)}.")
    return lines


def print_report(runs: Sequence[Run], config: ExperimentConfig, *, console: Console) -> None:
    """The table, and what is said of the served policy."""
    console.print(table(summarise(runs), config))
    served = summarise_served(runs)
    if served is not None:
        for line in sentences(served):
            console.print(line, highlight=False)


def _count(config: ExperimentConfig) -> str:
    return f"mean ± deviation of {len(config.seeds)} seeds" if len(config.seeds) > 1 else "one seed"


def describe(config: ExperimentConfig) -> str:
    """The task in words."""
    names = {
        "digits": "handwritten digits",
        "paper": "linear teacher (paper)",
        "paper-noisy": "linear teacher, noisy margins",
    }
    flips = f", {100 * config.flipped:g} % of the labels flipped" if config.flipped else ", clean labels"
    return names[config.dataset] + flips


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def _run(run: Run) -> dict[str, Any]:
    return {
        "method": run.method,
        "seed": run.seed,
        "learning_rate": run.candidate.learning_rate,
        "settings": finite(dict(run.candidate.settings)),
        "candidates": run.candidates,
        "chosen_step": int(run.trained.curve.steps[run.chosen]),
        "auroc": run.auroc,
        "seconds": round(run.seconds, 3),
        "facts": None if run.facts is None else asdict(run.facts),
        "curve": run.trained.curve.to_json(),
    }
