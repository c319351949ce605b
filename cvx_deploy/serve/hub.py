"""What happens to jobs, told to whoever listens: from the threads of workers into the server's event loop."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Happening = dict[str, Any]
_MOST = 256  # of events that a slow listener has not taken yet


class Hub:
    """Listeners by job, and how far each running job is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Queue[Happening]]]] = defaultdict(list)
        self._progress: dict[str, int] = {}

    def progress(self, job: str, known: int) -> int:
        """Return how far a job is, in percent; `known` is what its record says."""
        return self._progress.get(job, known)

    def tell(self, job: str, happening: Happening) -> None:
        """Tell of something; those who take too long miss some of it, but never the end."""
        if "progress" in happening:
            self._progress[job] = happening["progress"]
        with self._lock:
            listeners = list(self._listeners.get(job, ()))
        for loop, waiting in listeners:
            loop.call_soon_threadsafe(_put, waiting, happening)

    def ended(self, job: str) -> None:
        """Tell that a job's state has changed for good: listeners look at its record."""
        self._progress.pop(job, None)
        self.tell(job, {"event": "ended"})

    def changed(self, job: str) -> None:
        """Tell that a job's state has changed."""
        self.tell(job, {"event": "changed"})

    @contextmanager
    def listening(self, job: str) -> Iterator["asyncio.Queue[Happening]"]:
        """Give a queue of what happens to a job from now on, within an event loop."""
        own = (asyncio.get_running_loop(), asyncio.Queue[Happening]())
        with self._lock:
            self._listeners[job].append(own)
        try:
            yield own[1]
        finally:
            with self._lock:
                self._listeners[job].remove(own)
                if not self._listeners[job]:
                    del self._listeners[job]


def _put(waiting: "asyncio.Queue[Happening]", happening: Happening) -> None:
    if waiting.qsize() >= _MOST and happening["event"] not in ("ended", "changed"):
        return
    waiting.put_nowait(happening)
