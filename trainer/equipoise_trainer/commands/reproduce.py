"""Repeat the experiments of the Learning Law's paper (arXiv 2402.17759) with a policy server."""

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, cast

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from equipoise import EquipoiseError
from equipoise_trainer.commands.local_server import local_server
from equipoise_trainer.offline.adjoint import StoppedError
from equipoise_trainer.offline.copies import RowsLostError
from equipoise_trainer.reproduction.jobs import Job, perceptron_jobs
from equipoise_trainer.reproduction.publication import publish
from equipoise_trainer.reproduction.sites import RowsAt
from equipoise_trainer.reproduction.studies import SCALING_STEPS, STUDIES, Study, parse_studies, scaling_study
from equipoise_trainer.reproduction.texts import TEXT_STUDIES, TextStudy, text_jobs

USAGE_ERROR = 2
FAILED = 1

S = TypeVar("S", Study, TextStudy)

Seeds = Annotated[int, typer.Option(min=1, help="How many seeds.")]
FirstSeed = Annotated[int, typer.Option(min=0, help="The first seed; the others follow.")]
PolicyEpochs = Annotated[int | None, typer.Option(help="How often rows are moved. Default: the study's.")]
Steps = Annotated[int | None, typer.Option(help="T. Default: the study's.")]
StepSize = Annotated[float | None, typer.Option(help="ε of the paper's Eq. 6. Default: the study's.")]
WarmUp = Annotated[int | None, typer.Option(help="Policy epochs over which ε is grown to. Default: the study's.")]
Server = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Policy server. Default: a local one, for this run.")
]
Rows = Annotated[str, typer.Option(metavar="served|local", help="Who holds the rows: the server, or this process.")]
Online = Annotated[bool, typer.Option(help="Whether one run with an online policy is made beside.")]
Minutes = Annotated[float | None, typer.Option(help="Stop after so many minutes; the same command goes on.")]
Output = Annotated[Path, typer.Option(metavar="DIR", help="Where runs and the page go.")]

FOLDER: Final = Path("reports/reproduction")

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")


@app.callback()
def reproduce() -> None:
    """Repeat the experiments of arXiv 2402.17759 with a policy server, and compare with what the paper says.

    What the folder holds already is not run again: a command that was stopped or killed goes on. Each command makes the
    page of all that is in the folder.
    """


@app.command()
def perceptron(
    studies: Annotated[str, typer.Option(metavar="all|NAME,…", help=f"Among {', '.join(STUDIES)}.")] = "all",
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    steps: Steps = None,
    policy_epochs: PolicyEpochs = None,
    step_size: StepSize = None,
    warm_up: WarmUp = None,
    server: Server = None,
    rows: Rows = "served",
    online: Online = True,
    minutes: Minutes = None,
    output: Output = FOLDER,
) -> None:
    """The paper's linear perceptron: near-optimal policies by searching whole training runs."""

    def jobs() -> list[Job]:
        changes = {"steps": steps, "policy_epochs": policy_epochs, "step_size": step_size, "warm_up": warm_up}
        chosen = [_changed(study, changes) for study in parse_studies(studies)]
        numbers = range(first_seed, first_seed + seeds)
        return perceptron_jobs(chosen, numbers, folder=output / "perceptron", measured_epochs=16)

    _reproduce("perceptron", jobs, server=server, rows=rows, online=online, minutes=minutes, output=output)


@app.command()
def lm(
    preset: Annotated[str, typer.Option(metavar="|".join(TEXT_STUDIES), help="Size.")] = "cpu",
    corpus: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Text file, or Hugging Face data set on disk. Default: Python's topics."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where the model runs.")] = "auto",
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    steps: Steps = None,
    policy_epochs: PolicyEpochs = None,
    step_size: StepSize = None,
    learning_rate: Annotated[float | None, typer.Option(help="η. Default: the preset's.")] = None,
    server: Server = None,
    rows: Rows = "served",
    online: Online = True,
    minutes: Minutes = None,
    output: Output = FOLDER,
) -> None:
    """The paper's transformer on text half of which carries its noise."""

    def jobs() -> list[Job]:
        if preset not in TEXT_STUDIES:
            raise ValueError(f"preset: {preset!r}, must be one of {', '.join(TEXT_STUDIES)}")
        changes = {
            "steps": steps,
            "policy_epochs": policy_epochs,
            "step_size": step_size,
            "learning_rate": learning_rate,
        }
        study = _changed(TEXT_STUDIES[preset], changes)
        numbers = range(first_seed, first_seed + seeds)
        return text_jobs(study, numbers, folder=output / "lm", corpus=corpus, device=_device(device))

    _reproduce("lm", jobs, server=server, rows=rows, online=online, minutes=minutes, output=output)


@app.command()
def scaling(
    sizes: Annotated[str, typer.Option(metavar="T,T,…", help="Training steps of the runs.")] = ",".join(
        str(steps) for steps in SCALING_STEPS
    ),
    seeds: Seeds = 3,
    first_seed: FirstSeed = 0,
    policy_epochs: PolicyEpochs = None,
    server: Server = None,
    rows: Rows = "served",
    minutes: Minutes = None,
    output: Output = FOLDER,
) -> None:
    """The scaling law L0 + (B/t)^β: perceptron runs of several lengths, and the transformer runs in the folder.

    One L0 for both policies, bootstrap over seeds and windows, sensitivity to L0, acceleration by Eq. 9.
    """

    def jobs() -> list[Job]:
        lengths = [int(size) for size in sizes.split(",") if size.strip()]
        chosen = [_changed(scaling_study(each), {"policy_epochs": policy_epochs}) for each in lengths]
        numbers = range(first_seed, first_seed + seeds)
        return perceptron_jobs(chosen, numbers, folder=output / "scaling", measured_epochs=3)

    _reproduce("scaling", jobs, server=server, rows=rows, online=False, minutes=minutes, output=output)


def _reproduce(
    command: str,
    jobs: Callable[[], list[Job]],
    *,
    server: str | None,
    rows: str,
    online: bool,
    minutes: float | None,
    output: Path,
) -> None:
    console = Console(highlight=False)
    try:
        if rows not in ("served", "local"):
            raise ValueError(f"rows: {rows!r}, must be served or local")
        missing = [job for job in jobs() if not job.finished]
    except ValueError as error:
        print(f"equipoise reproduce {command}: {error}", file=sys.stderr)
        raise typer.Exit(USAGE_ERROR) from error
    until = time.monotonic() + (60 * minutes if minutes is not None else float("inf"))
    needed = bool(missing) and (online or rows == "served")
    data_dir = output / f"server-{command}"
    try:
        with _ends_in_order(), _server(server, needed=needed, data_dir=data_dir, console=console) as address:
            for job in missing:
                told = _teller(job, console)
                job.run(
                    at=cast("RowsAt", rows),
                    address=address,
                    online=online,
                    stop=lambda: time.monotonic() > until,
                    on_epoch=told,
                )
    except StoppedError as stopped:
        console.print(f"{stopped}; the same command goes on.")
        return
    except (EquipoiseError, RowsLostError, ValueError) as error:
        print(f"equipoise reproduce {command}: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from error
    if needed and server is None:
        shutil.rmtree(data_dir, ignore_errors=True)
    _publish(output, console=console)


def _changed(study: S, changes: dict[str, Any]) -> S:
    return replace(study, **{name: value for name, value in changes.items() if value is not None})


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: {name!r}, must be auto, cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _teller(job: Job, console: Console) -> Callable[[int, float], None]:
    last = job.rows.policy_epochs
    every = max(1, last // 10)

    def told(epoch: int, seconds: float) -> None:
        if epoch == 1 or epoch % every == 0 or epoch == last:
            console.print(f"{job.name}, seed {job.seed}: policy epoch {epoch} of {last}, {seconds:.1f} s")

    return told


def _publish(output: Path, *, console: Console) -> None:
    """Makes the page of what is in the folder, and says what it says."""
    publication = publish(output)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("claim", "paper", "ours", "reproduced?"):
        table.add_column(heading, overflow="fold")
    for claim in publication.claims:
        table.add_row(claim.what, claim.paper, claim.ours, claim.verdict)
    console.print(table)
    console.print(f"Page: {publication.page}   Numbers: {publication.data}", soft_wrap=True)


@contextmanager
def _server(server: str | None, *, needed: bool, data_dir: Path, console: Console) -> Iterator[str | None]:
    """Address of the policy server; without one, a local server runs meanwhile. None: none is needed.

    The local server's data stay in `data_dir`, so that a run that was killed finds its rows again.
    """
    if server is not None or not needed:
        yield server if needed else None
        return
    console.print("No --server: starting a local one for this run …")
    data_dir.mkdir(parents=True, exist_ok=True)
    with local_server(data_dir=data_dir.resolve()) as local:
        console.print(f"Local policy server at {local.address}, with a Redis of its own.")
        yield local.address


@contextmanager
def _ends_in_order() -> Iterator[None]:
    """Lets SIGTERM end the command as Ctrl-C does, its local server with it: the next one needs the same data."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str]) -> int:
    """Runs `equipoise reproduce`; returns the exit status: 2 for arguments that cannot be used, 1 when it failed."""
    try:
        app(args=list(arguments), prog_name="equipoise reproduce")
    except SystemExit as done:
        return int(done.code or 0)
    return 0
