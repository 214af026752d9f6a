"""Train a reference model whose examples a policy server weighs."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, cast

import typer
from rich.console import Console

from equipoise import EquipoiseError
from equipoise_trainer.commands.images import images
from equipoise_trainer.commands.lm import lm
from equipoise_trainer.commands.local_server import server_address
from equipoise_trainer.commands.options import (
    FAILED,
    USAGE_ERROR,
    parse_batch,
    parse_rates,
    parse_settings,
    parse_tuned,
)
from equipoise_trainer.commands.prompts import prompts
from equipoise_trainer.datasets import DATASETS
from equipoise_trainer.experiment import ExperimentConfig, Run, run_experiment
from equipoise_trainer.methods import METHODS, TITLES, parse_methods
from equipoise_trainer.progress import progress_bar
from equipoise_trainer.report import print_report, save_report

DEFAULT_STEPS: Final = {"digits": 800, "paper": 1000, "paper-noisy": 1000}
DEFAULT_RATES: Final = {"digits": 2.0, "paper": 0.1, "paper-noisy": 0.1}

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")


@app.callback()
def train() -> None:
    """Train a reference model whose examples a policy server weighs."""


@app.command()
def perceptron(
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Policy server. Default: a local one, for this run.")
    ] = None,
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(DATASETS)}.")] = "digits",
    flipped: Annotated[float, typer.Option(help="Share of training labels that are replaced by wrong ones.")] = 0.2,
    rule: Annotated[str, typer.Option(help="Rule of the served policy.")] = "ema_sign",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Setting of the rule; may repeat.")
    ] = None,
    tuned: Annotated[
        list[str] | None,
        typer.Option("--tune", metavar="KEY=VALUE,VALUE", help="Setting that guard B chooses per seed; may repeat."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 5,
    first_seed: Annotated[int, typer.Option(help="The first seed; the others follow.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps. Default: digits 800, else 1000.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="η. Default: digits 2, else 0.1.")] = None,
    learning_rates: Annotated[
        str, typer.Option(metavar="η,η", help="Learning rates that guard B chooses from, per seed and method.")
    ] = "",
    batch: Annotated[str, typer.Option(metavar="full|B", help="Examples per step.")] = "full",
    target_size: Annotated[int | None, typer.Option(help="Examples of target A. Default: the data set's.")] = None,
    methods: Annotated[str, typer.Option(help=f"What is compared: {','.join(METHODS)}.")] = ",".join(METHODS),
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where report.json and report.png go.")] = Path(
        "reports/perceptron"
    ),
    when_lost: Annotated[
        str, typer.Option(metavar="continue|wait", help="While the server is lost: go on, or wait (reproducible).")
    ] = "continue",
) -> None:
    """Softmax regression with exact contributions: how much does a served policy help, and against what?

    Guard B alone chooses: hyper-parameters, and the step at which each run is read off. Losses are in nats.
    """
    console = Console()
    try:
        if when_lost not in ("continue", "wait"):
            raise ValueError(f"when_lost: {when_lost!r}, must be continue or wait")
        if seeds < 1:
            raise ValueError(f"seeds: {seeds}, must be at least 1")
        config = ExperimentConfig(
            dataset=dataset,
            flipped=flipped,
            target_size=target_size,
            seeds=tuple(range(first_seed, first_seed + seeds)),
            methods=parse_methods(methods),
            steps=DEFAULT_STEPS.get(dataset, 1000) if steps is None else steps,
            learning_rate=DEFAULT_RATES.get(dataset, 0.1) if learning_rate is None else learning_rate,
            learning_rates=parse_rates(learning_rates),
            batch_size=parse_batch(batch),
            rule=rule,
            settings=parse_settings(settings or []),
            tuned_settings=parse_tuned(tuned or []),
            when_lost=cast("Literal['continue', 'wait']", when_lost),
        )
    except ValueError as error:
        print(f"equipoise train perceptron: {error}", file=sys.stderr)
        raise typer.Exit(USAGE_ERROR) from error
    try:
        with server_address(server, needed="served" in config.methods, console=console) as (address, words):
            with progress_bar(config.total_steps, titles=TITLES, console=console) as on_step:
                runs: list[Run] = list(run_experiment(config, address=address, on_step=on_step))
            print_report(runs, config, console=console)
            files = save_report(runs, config, directory=output, server=words)
    except EquipoiseError as error:
        print(f"equipoise train perceptron: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from error
    console.print(f"Picture: {files.picture}   Data: {files.data}", highlight=False, soft_wrap=True)


app.command()(images)
app.command()(lm)
app.command()(prompts)


def main(arguments: Sequence[str]) -> int:
    """Runs `equipoise train`; returns the exit status: 2 for arguments that cannot be used, 1 when the run failed."""
    try:
        app(args=list(arguments), prog_name="equipoise train")
    except SystemExit as done:
        return int(done.code or 0)
    return 0
