"""`equipoise train prompts`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from equipoise import EquipoiseError
from equipoise_trainer.commands.local_server import server_address
from equipoise_trainer.commands.options import FAILED, USAGE_ERROR, parse_rates, parse_settings
from equipoise_trainer.progress import progress_bar
from equipoise_trainer.prompts.report import print_report, save_report
from equipoise_trainer.prompts.runs import SERVED, TITLES, ExperimentConfig, run_experiment
from equipoise_trainer.prompts.task import JOBS


def prompts(
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Policy server. Default: a local one, for this run.")
    ] = None,
    job: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {job.about}" for name, job in JOBS.items()) + ".")
    ] = "rare",
    methods: Annotated[str, typer.Option(help="What is compared.")] = ",".join(TITLES),
    learning_rates: Annotated[str, typer.Option(metavar="η,η", help="Of SGD; each is run.")] = "10,30,100",
    batch: Annotated[int, typer.Option(help="Prompts of a batch.")] = 32,
    group: Annotated[int, typer.Option(help="Completions of a prompt.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer, at most.")] = 3000,
    target: Annotated[float, typer.Option(help="Success rate at which a run ends.")] = 0.9,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Setting of learnability; may repeat.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="The first seed; the others follow.")] = 0,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where report.json and report.png go.")] = Path(
        "reports/prompts"
    ),
) -> None:
    """Reinforcement learning with verifiable rewards: how many completions do prompts drawn by learnability save?

    A toy policy, trained by GRPO on prompts of which most succeed always or never.
    """
    console = Console()
    try:
        chosen = {name.strip() for name in methods.split(",") if name.strip()}
        unknown = sorted(chosen - set(TITLES))
        config = ExperimentConfig(
            job=job,
            methods=(*(name for name in TITLES if name in chosen), *unknown),
            seeds=tuple(range(first_seed, first_seed + seeds)),
            learning_rates=parse_rates(learning_rates),
            batch=batch,
            group=group,
            steps=steps,
            target=target,
            settings=parse_settings(settings or []),
        )
    except ValueError as error:
        print(f"equipoise train prompts: {error}", file=sys.stderr)
        raise typer.Exit(USAGE_ERROR) from error
    needed = any(method in SERVED for method in config.methods)
    try:
        with server_address(server, needed=needed, console=console) as (address, words):
            with progress_bar(config.num_runs, titles=TITLES, console=console, unit="runs") as on_run:
                runs = list(run_experiment(config, address=address, on_run=on_run))
            print_report(runs, config, console=console)
            files = save_report(runs, config, directory=output, server=words)
    except EquipoiseError as error:
        print(f"equipoise train prompts: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from error
    console.print(f"Picture: {files.picture}   Data: {files.data}", highlight=False, soft_wrap=True)
