"""A progress bar over all training steps of an experiment."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

NameT = TypeVar("NameT", bound=str)


@contextmanager
def progress_bar(
    total_steps: int, *, titles: Mapping[NameT, str], console: Console, unit: str = "steps"
) -> Iterator[Callable[[NameT, int], None]]:
    """Shows a bar while inside; on no terminal it shows nothing.

    Args:
        total_steps: of all runs together.
        titles: what the methods are called.
        console: where.
        unit: what is counted.

    Yields:
        What is to be called after each step with the method and the step within its run, from 1.
    """
    width = max(len(title) for title in titles.values())
    columns = (
        TextColumn(f"{{task.description:<{width}}}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total_steps)

        def on_step(method: NameT, step: int) -> None:
            progress.update(bar, advance=1, description=titles[method] if step == 1 else None)

        yield on_step
