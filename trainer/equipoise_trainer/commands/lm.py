"""`equipoise train lm`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from equipoise import EquipoiseError
from equipoise_trainer.commands.local_server import server_address
from equipoise_trainer.commands.options import FAILED, USAGE_ERROR, parse_rates
from equipoise_trainer.lm.experiment import ExperimentConfig, run_experiment
from equipoise_trainer.lm.methods import COMPARED, METHODS, parse_methods
from equipoise_trainer.lm.presets import PRESETS
from equipoise_trainer.lm.recipes import RECIPES
from equipoise_trainer.lm.report import print_report, save_report
from equipoise_trainer.lm.workers import working
from equipoise_trainer.progress import progress_bar


def lm(
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Policy server. Default: a local one, for this run.")
    ] = None,
    recipe: Annotated[str, typer.Option(help=f"What is wrong with the data: {', '.join(RECIPES)}.")] = "three-sources",
    preset: Annotated[str, typer.Option(help=f"Size of model and vocabulary: {', '.join(PRESETS)}.")] = "small",
    corpus: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Text file, or Hugging Face data set on disk. Default: Python's topics."),
    ] = None,
    methods: Annotated[str, typer.Option(help=f"What is compared: {','.join(METHODS)}.")] = ",".join(COMPARED),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="The first seed; the others follow.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps of a run. Default: the preset's.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per step. Default: the preset's.")] = None,
    learning_rates: Annotated[
        str, typer.Option(metavar="η,η", help="Of AdamW; guard B chooses one for each method. Default: the preset's.")
    ] = "",
    tuned_seeds: Annotated[int, typer.Option(min=1, help="Seeds on which all learning rates are tried.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
    log_every: Annotated[int, typer.Option(help="Steps between two measurements.")] = 25,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where report and runs go; runs found there count.")
    ] = Path("reports/lm"),
) -> None:
    """A small GPT: how much does a served policy help, against what, and at what price?

    Guard B alone chooses: learning rates, and the step at which each run is read off. Everything that a method
    computes beside plain steps is paid for in compute units. A command that was interrupted goes on when it is given
    again.
    """
    console = Console()
    try:
        if preset not in PRESETS:
            raise ValueError(f"preset: {preset!r}, must be one of {', '.join(PRESETS)}")
        size = PRESETS[preset]
        config = ExperimentConfig(
            recipe=recipe,
            preset=size,
            corpus=corpus,
            seeds=tuple(range(first_seed, first_seed + seeds)),
            methods=parse_methods(methods),
            steps=size.steps if steps is None else steps,
            batch_size=size.batch_size if batch is None else batch,
            learning_rates=parse_rates(learning_rates) or size.learning_rates,
            tuned_seeds=tuned_seeds,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
        )
        config.check_corpus()
    except ValueError as error:
        print(f"equipoise train lm: {error}", file=sys.stderr)
        raise typer.Exit(USAGE_ERROR) from error
    titles = {name: METHODS[name].title for name in config.methods}
    try:
        with (
            server_address(server, needed=config.needs_server, console=console) as (address, words),
            progress_bar(config.total_steps, titles=titles, console=console) as on_step,
            working(config, directory=output / "runs", address=address, jobs=jobs, on_step=on_step) as workers,
        ):
            runs = run_experiment(config, workers)
        print_report(runs, config, console=console)
        files = save_report(runs, config, directory=output, server=words)
    except EquipoiseError as error:
        print(f"equipoise train lm: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from error
    console.print(f"Picture: {files.picture}   Data: {files.data}", highlight=False, soft_wrap=True)
