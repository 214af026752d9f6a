"""The report of an experiment with language models: a table, `report.json` and `report.png`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from equipoise_trainer.lm import costs
from equipoise_trainer.lm.experiment import FORMAT, ExperimentConfig
from equipoise_trainer.lm.methods import HEADLINE, METHODS
from equipoise_trainer.lm.plots import save_picture
from equipoise_trainer.lm.recipes import GUARD_SIZE, SOURCES, TARGET_SIZE, TEST_SIZE
from equipoise_trainer.lm.records import RunRecord
from equipoise_trainer.lm.summary import MethodSummary, summarise
from equipoise_trainer.provenance import finite, machine, versions
from equipoise_trainer.report import ReportFiles


def save_report(runs: Sequence[RunRecord], config: ExperimentConfig, *, directory: Path, server: str) -> ReportFiles:
    """Writes `report.json` and `report.png` into `directory`, which is made if need be.

    Args:
        runs: of all methods and seeds, at the chosen learning rates.
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


def to_json(runs: Sequence[RunRecord], config: ExperimentConfig, *, server: str) -> dict[str, Any]:
    """The whole report; losses in nats."""
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "server": server,
        "machine": machine(),
        "versions": versions(),
        "config": {**asdict(config), "corpus": None if config.corpus is None else str(config.corpus)},
        "sequences": {"target": TARGET_SIZE, "guard": GUARD_SIZE, "test": TEST_SIZE},
        "costs": {"plain": costs.PLAIN, "ghost": costs.GHOST, "one_pass": costs.ONE_PASS, "forward": costs.FORWARD},
        "sources": SOURCES,
        "methods": {
            name: {**asdict(METHODS[name]), "settings": dict(METHODS[name].settings)} for name in config.methods
        },
        "summary": [finite(asdict(row)) for row in summarise(runs)],
        "runs": [finite(asdict(run)) for run in runs],
    }


def print_report(runs: Sequence[RunRecord], config: ExperimentConfig, *, console: Console) -> None:
    """The table, and what is said of noise below it."""
    rows = summarise(runs)
    console.print(table(rows, config))
    for row in rows:
        if row.auroc:
            areas = ", ".join(f"{area:.3f}" for area in row.auroc)
            console.print(f"AUROC of finding noise from the scores, {row.title}: {areas}.", highlight=False)


def table(rows: Sequence[MethodSummary], config: ExperimentConfig) -> Table:
    """One row per method. Fits 80 columns."""
    seeds = f"mean ± deviation of {len(config.seeds)} seeds" if len(config.seeds) > 1 else "one seed"
    result = Table(
        title=describe(config),
        caption=f"{seeds}; nats where guard B reads the runs off; gain: below uniform, seeds;\n"
        "speed: compute units to uniform's lowest loss; U, s: units and seconds of a run",
        box=box.SIMPLE_HEAD,
        padding=0,  # the box parts the columns by a space
        show_edge=False,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("method", no_wrap=True)
    for heading in ("lr", "test loss", "final", "gain", "speed", "U", "s", "weight"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            row.title,
            f"{row.learning_rate:g}".removeprefix("0"),
            f"{row.test_loss:.3f}" if len(config.seeds) > 1 else f"{row.test_loss.mean:.3f}",
            f"{row.final_test_loss.mean:.3f}",
            below(row),
            speed(row),
            f"{row.units:.0f}",
            f"{row.seconds:.0f}",
            "" if row.shares is None else "/".join(f"{100 * share:.0f}" for share in row.shares),
            style="bold green" if row.method == HEADLINE else "",
        )
    return result


def below(row: MethodSummary) -> str:
    """How far a method is below uniform in the mean, and in how many seeds it is at all."""
    if row.method == "uniform" or not row.below_uniform:
        return ""
    wins = sum(value > 0 for value in row.below_uniform)
    return f"{sum(row.below_uniform) / len(row.below_uniform):+.3f} {wins}/{len(row.below_uniform)}"


def speed(row: MethodSummary) -> str:
    """The speed-up in the mean over seeds that reached uniform's lowest loss, and how many did."""
    if row.method == "uniform" or not row.speed_ups:
        return ""
    reached = [value for value in row.speed_ups if value is not None]
    if not reached:
        return "never"
    missed = "" if len(reached) == len(row.speed_ups) else f" {len(reached)}/{len(row.speed_ups)}"
    return f"{sum(reached) / len(reached):.2f}×{missed}"


def describe(config: ExperimentConfig) -> str:
    """The experiment in words."""
    corpus = "Python's documentation" if config.corpus is None else config.corpus.name
    preset = config.preset
    return (
        f"{config.recipe}, {corpus}; GPT of width {preset.width}, {preset.layers} layers, length {preset.length}, "
        f"{preset.vocabulary} tokens; {config.steps} steps of {config.batch_size}; weight: {'/'.join(SOURCES)}, %"
    )
