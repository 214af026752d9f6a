"""`equipoise train images`."""

import sys
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from equipoise import EquipoiseError
from equipoise.torch import TrainingOptions
from equipoise_trainer.commands.local_server import server_address
from equipoise_trainer.commands.options import FAILED, USAGE_ERROR, parse_rates, parse_settings
from equipoise_trainer.images.data import NOISES, Noise
from equipoise_trainer.images.report import print_report, save_report
from equipoise_trainer.images.rivals import cleanlab_is_installed
from equipoise_trainer.images.runs import TITLES, ExperimentConfig, parse_methods, run_experiment
from equipoise_trainer.images.served import RULES
from equipoise_trainer.progress import progress_bar


def images(
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Policy server. Default: a local one, for this run.")
    ] = None,
    noise: Annotated[str, typer.Option(help=f"How labels are wrong: {', '.join(NOISES)}.")] = "confused",
    wrong: Annotated[float, typer.Option(help="Share of the training labels that are wrong.")] = 0.3,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 20,
    batch: Annotated[int, typer.Option(help="Images per step.")] = 32,
    rule: Annotated[str, typer.Option(help="Rule of the served policy.")] = "strata",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Setting of that rule; may repeat.")
    ] = None,
    measure_every: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Contributions are measured of every K-th batch; 0: never. Default: what suits the rule."
        ),
    ] = None,
    compare_every: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Losses of target examples are measured every K-th batch; 0: never. Default: the same."
        ),
    ] = None,
    refresh_every: Annotated[
        int | None,
        typer.Option(metavar="K", help="The target direction is refreshed every K steps. Default: the same."),
    ] = None,
    momentum: Annotated[
        float | None, typer.Option(help="Share of the direction before that a refresh keeps. Default: the same.")
    ] = None,
    methods: Annotated[str, typer.Option(help=f"What is compared: {','.join(TITLES)}. Default: all.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first seed; the others follow.")] = 0,
    learning_rates: Annotated[
        str, typer.Option(metavar="η,η", help="Of Adam; guard B chooses, per seed and method.")
    ] = "0.001",
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where report.json and report.png go.")] = Path(
        "reports/images"
    ),
) -> None:
    """A small deep network and wrong labels: does a served policy help, and as much as its rivals do?

    All methods see the same images in the same order, from the same initial network, and are read off after the last
    epoch. Those with a known rate are told the true share of wrong labels.
    """
    console = Console()
    try:
        config = ExperimentConfig(
            noise=cast(Noise, noise),
            share=wrong,
            epochs=epochs,
            batch=batch,
            learning_rates=parse_rates(learning_rates),
            seeds=tuple(range(first_seed, first_seed + seeds)),
            methods=parse_methods(methods),
            rule=rule,
            settings=parse_settings(settings or []),
            options=TrainingOptions(
                measure_every=measure_every,
                compare_every=compare_every,
                refresh_every=refresh_every,
                momentum=momentum,
            ),
        )
    except ValueError as error:
        print(f"equipoise train images: {error}", file=sys.stderr)
        raise typer.Exit(USAGE_ERROR) from error
    if not methods and not cleanlab_is_installed():
        console.print("Without cleanlab, which is not installed: pip install cleanlab", highlight=False)
    needed = any(method in RULES for method in config.methods)
    try:
        with server_address(server, needed=needed, console=console) as (address, words):
            with progress_bar(config.num_runs, titles=TITLES, console=console, unit="runs") as on_run:
                runs = list(run_experiment(config, address=address, on_run=on_run))
            print_report(runs, config, console=console)
            files = save_report(runs, config, directory=output, server=words)
    except EquipoiseError as error:
        print(f"equipoise train images: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from error
    console.print(f"Picture: {files.picture}   Data: {files.data}", highlight=False, soft_wrap=True)
