"""How long work shows itself: a task with a bar on a terminal, nothing when quiet. Always on stderr."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from cvx_deploy.terminal import safe

Advance = Callable[[int], None]


class Progress(Protocol):
    """What long work reports to."""

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Show a task until the block ends; call the yielded function with every amount done."""

    def note(self, text: str) -> None:
        """Tell the user something worth knowing, in one line."""


class SilentProgress:
    """Shows nothing."""

    @contextlib.contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        """Run the block."""
        yield lambda _: None

    def note(self, text: str) -> None:
        """Drop the note."""


_EVERY = 30.0  # seconds of a task between two lines about it, where there is no terminal


class RichProgress:
    """Bars and notes on stderr, through rich; without a terminal, notes, and now and then a line about a long task."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    @contextlib.contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        """Show a bar (a spinner when `total` is unknown) that stays on screen with its time when done."""
        if not self._console.is_terminal:
            yield self._lines(description, total)
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeRemaining

        described = TextColumn("{task.description:<34}", markup=False)
        columns = (SpinnerColumn(), described, BarColumn(), TaskProgressColumn())
        times = (TimeElapsedColumn(), TimeRemaining())
        with Progress(*columns, *times, console=self._console) as bars:
            bar = bars.add_task(safe(description), total=total)
            yield lambda amount: bars.advance(bar, amount)
            bars.update(bar, total=total or 1, completed=total or 1)

    def _lines(self, description: str, total: int | None) -> Advance:
        """Return what takes every amount done, and says now and then how far a task is."""
        start = said = time.monotonic()
        done = 0

        def advance(amount: int) -> None:
            nonlocal said, done
            done, now = done + amount, time.monotonic()
            if now - said >= _EVERY:
                said = now
                far = "at work" if not total else f"{done / total:.0%}"
                self.note(f"{description}: {far}, {now - start:.0f} s")

        return advance

    def note(self, text: str) -> None:
        """Print the note as one line, without markup; it is not broken, so that paths in it stay whole."""
        self._console.print(safe(text), markup=False, highlight=False, emoji=False, soft_wrap=True)
