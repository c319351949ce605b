"""A worker that can be told words and tells words of its own: here a process on this machine."""

import json
import os
import queue
import subprocess
import sys
import threading
from typing import Any, Protocol

Word = dict[str, Any]


class GoneError(Exception):
    """The worker is not there any more, or had to go; says why."""


class Employed(Protocol):
    """A worker of one device, wherever it runs; its words are those of `serve.worker`."""

    def say(self, words: Word) -> None:
        """Tell it something; where it has gone, that is seen by whoever waits for its words."""

    def heard(self, seconds: float) -> Word | None:
        """Return its next word, waiting for it so long at the most; None where none came.

        Raises:
            GoneError: None will come any more.
        """

    def end(self) -> None:
        """Let it be gone when this returns."""


class WorkerProcess:
    """A process of `serve.worker` on this machine.

    Args:
        settings: See `ServeSettings.for_worker`.
    """

    def __init__(self, settings: Word) -> None:
        debugging = os.environ.get("CVX_DEBUG", "0") not in ("", "0")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cvx_deploy.serve.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if debugging else subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._heard: queue.Queue[Word | None] = queue.Queue()
        self._saying = threading.Lock()
        threading.Thread(target=self._hear, daemon=True).start()
        self.say(settings)

    def say(self, words: Word) -> None:
        """See `Employed`."""
        assert self._process.stdin is not None
        try:
            with self._saying:
                self._process.stdin.write(json.dumps(words) + "\n")
                self._process.stdin.flush()
        except (OSError, ValueError):  # it has gone
            return

    def heard(self, seconds: float) -> Word | None:
        """See `Employed`."""
        try:
            word = self._heard.get(timeout=seconds) if seconds > 0 else self._heard.get_nowait()
        except queue.Empty:
            return None
        if word is None:
            raise GoneError(self._how_it_ended())
        return word

    def end(self) -> None:
        """See `Employed`."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:
                continue

    def _hear(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._heard.put(json.loads(line))
        except ValueError:  # no word of a worker, or the stream was closed
            pass
        finally:
            self._heard.put(None)

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
