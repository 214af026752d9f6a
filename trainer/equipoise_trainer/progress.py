"""A progress bar over all training steps of an experiment."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equipoise_trainer.experiment import OnStep
from equipoise_trainer.methods import METHODS, TITLES, Method


@contextmanager
def progress_bar(total_steps: int, *, console: Console) -> Iterator[OnStep]:
    """Shows a bar while inside; gives what is to be called after each step. On no terminal it shows nothing."""
    width = max(len(TITLES[method]) for method in METHODS)
    columns = (
        TextColumn(f"{{task.description:<{width}}}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total_steps)

        def on_step(method: Method, step: int) -> None:
            progress.update(bar, advance=1, description=TITLES[method] if step == 1 else None)

        yield on_step
