"""See a policy server help a training job, and survive being killed."""

import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from equipoise import EquipoiseError
from equipoise.testing import ServerProcess
from equipoise_trainer.commands.local_server import local_server
from equipoise_trainer.experiment import ExperimentConfig, OnStep, Run, run_experiment
from equipoise_trainer.methods import TITLES, Method
from equipoise_trainer.progress import progress_bar
from equipoise_trainer.report import print_report, save_report
from equipoise_trainer.serving import ServedFacts

FAILED = 1
METRICS_SHOWN = ("policy_version", "weight_effective_examples_ratio", "sim", "target_loss", "guard_loss")
RESTART_AFTER_S = 1.0

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@dataclass(slots=True)
class Accident:
    """Kills a server when a served run is at a step, and starts it again a second later, once.

    Attributes:
        server: the server.
        at_step: the step, within the first served run that gets there.
        down_s: how long the server was away, seconds; None: it was not killed, or is not back yet.
        error: what kept it from coming back.
    """

    server: ServerProcess
    at_step: int
    down_s: float | None = None
    error: EquipoiseError | None = None
    _thread: Thread | None = field(default=None, init=False)

    def on_step(self, method: Method, step: int) -> None:
        """To be called after each step."""
        if method == "served" and step == self.at_step and self._thread is None:
            self.server.kill()
            self._thread = Thread(target=self._repair, args=(time.monotonic(),), daemon=True)
            self._thread.start()

    def join(self) -> None:
        """Waits until the server is back. Raises what kept it from coming back."""
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error

    def _repair(self, killed_at: float) -> None:
        time.sleep(RESTART_AFTER_S)
        try:
            self.server.start()
        except EquipoiseError as error:
            self.error = error
        self.down_s = time.monotonic() - killed_at


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each run.")] = 800,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where report.json and report.png go.")] = Path(
        "demo-report"
    ),
) -> None:
    """Handwritten digits with 20 % wrong labels: plain training against training with a policy server.

    Half-way the server is killed with SIGKILL and started again, to show that nothing is lost.
    """
    console = Console(highlight=False)
    config = ExperimentConfig(
        dataset="digits",
        flipped=0.2,
        seeds=tuple(range(seeds)),
        methods=("uniform", "served"),
        steps=steps,
        learning_rate=2.0,
        settings={"ema_decay": 0.99, "guard": False},  # in a short run on data known to be noisy, trials cost more
        when_lost="wait",
    )
    try:
        _play(config, output=output, console=console)
    except EquipoiseError as error:
        print(f"equipoise demo: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from error


def _play(config: ExperimentConfig, *, output: Path, console: Console) -> None:
    console.print("[bold]Equipoise[/bold] tells a training job at every step how much each example counts.\n")
    console.print("Starting a policy server, a process of its own with its own Redis …")
    with local_server() as server:
        console.print(f"It serves on {server.address}. Now learning handwritten digits, 20 % of them")
        console.print("with wrong labels: first with all equal, then asking the server at every step.\n")
        accident = Accident(server, at_step=config.steps // 2)
        with (
            progress_bar(config.total_steps, titles=TITLES, console=console) as show,
            _both(show, accident.on_step) as on_step,
        ):
            runs = list(run_experiment(config, address=server.address, on_step=on_step))
        accident.join()
        killed = next(run for run in runs if run.method == "served")
        _tell_accident(killed, accident, console=console)
        console.print("The same run again, undisturbed:")
        first = replace(config, seeds=config.seeds[:1], methods=("served",))
        with progress_bar(first.total_steps, titles=TITLES, console=console) as show:
            (undisturbed,) = run_experiment(first, address=server.address, on_step=show)
        _tell_comparison(killed, undisturbed, console=console)
        print_report(runs, config, console=console)
        files = save_report(runs, config, directory=output, server="local, killed once and started again")
        console.print(f"\nThe picture: [bold]{files.picture}[/bold]   the numbers: {files.data}", soft_wrap=True)
        console.print(f"\nFrom the server's live metrics, http://{server.metrics_address}/metrics:")
        for line in policy_metrics(server.metrics_address, undisturbed.facts):
            console.print(f"  {line}", soft_wrap=True)
    console.print("\nNext: `equipoise serve`, and `equipoise train perceptron --help`.")


@contextmanager
def _both(first: OnStep, second: OnStep) -> Iterator[OnStep]:
    def on_step(method: Method, step: int) -> None:
        first(method, step)
        second(method, step)

    yield on_step


def _tell_accident(killed: Run, accident: Accident, *, console: Console) -> None:
    facts = killed.facts
    assert facts is not None, "a served run has facts"
    console.print(f"At step {accident.at_step} of the first served run the server was killed with SIGKILL. It was")
    console.print(f"back {accident.down_s:.1f} s later with its state from Redis, and the waiting trainer went on:")
    intact = facts.steps_sent == facts.version == facts.durable_version
    verdict = "[bold green]nothing lost[/bold green]" if intact else "[bold red]NOT the same[/bold red]"
    console.print(
        f"{facts.steps_sent} steps sent, {facts.version} applied, {facts.durable_version} durable: {verdict}."
    )


def _tell_comparison(killed: Run, undisturbed: Run, *, console: Console) -> None:
    same = np.array_equal(killed.trained.weights, undisturbed.trained.weights) and np.array_equal(
        killed.trained.parameters, undisturbed.trained.parameters
    )
    verdict = "[bold green]bit for bit[/bold green]" if same else "[bold red]NOT[/bold red]"
    console.print(f"Weights and parameters of the two runs are equal {verdict}.\n")


def policy_metrics(address: str, facts: ServedFacts | None) -> list[str]:
    """A few lines about one policy from a server's metrics page."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    wanted = tuple(f"equipoise_server_{name}{{" for name in METRICS_SHOWN)
    name = "" if facts is None else facts.policy
    return [line for line in lines if line.startswith(wanted) and f'"{name}"' in line]


def main(arguments: Sequence[str]) -> int:
    """Runs `equipoise demo`; returns the exit status: 2 for arguments that cannot be used, 1 when it failed."""
    try:
        app(args=list(arguments), prog_name="equipoise demo")
    except SystemExit as done:
        return int(done.code or 0)
    return 0
