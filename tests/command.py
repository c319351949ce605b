"""The command line in this process, or in one of its own, and what came out of it."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from cvx_deploy.cli import main

# Announces every task on stderr before it begins, so that a signal can be sent in the middle of one.
TELLING = """
import contextlib, signal, sys
import cvx_deploy.progress as progress

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where a shell has it ignored

class Telling(progress.SilentProgress):
    @contextlib.contextmanager
    def task(self, description, total=None):
        print("now:", description, file=sys.stderr, flush=True)
        with super().task(description, total) as advance:
            yield advance

progress.SilentProgress = Telling
from cvx_deploy.cli import main
"""


@dataclass(frozen=True)
class Outcome:
    """What a command left on its streams, and its exit code."""

    code: int
    out: str
    err: str

    def failure(self) -> str:
        """Return the one error line, after making sure that the failure is stated as failures are."""
        assert self.code == 1, self
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert ". fix: " in lines[0], lines[0]
        assert lines[0].endswith("."), lines[0]
        return lines[0]


def cvx(*words: object) -> Outcome:
    """Run ``cvx-deploy`` with these words in this process."""
    out, err, code = _stream("strict"), _stream("backslashreplace"), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    argv = mock.patch.object(sys, "argv", ["cvx-deploy", *map(str, words)])
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with argv, warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else -1
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Outcome(code, _text(out), _text(err))


def _stream(errors: str) -> io.TextIOWrapper:
    """Make what Python makes of stdout and stderr, but that it is in memory."""
    return io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors, write_through=True)


def _text(stream: io.TextIOWrapper) -> str:
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode()


def spawn(program: str, *words: object) -> subprocess.Popen[str]:
    """Start a Python program as another process; `words` are its arguments."""
    command = [sys.executable, "-c", program, *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(process: subprocess.Popen[str], announcement: str) -> None:
    """Read a process's stderr up to the line that holds `announcement`."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if announcement in line:
            return
    raise AssertionError(f"{announcement!r} never came: {''.join(seen)}")


def signalled(process: subprocess.Popen[str], number: signal.Signals) -> Outcome:
    """Send a signal and return what the process did then."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return Outcome(process.returncode, out, err)


def content(folder: Path) -> dict[str, bytes | str]:
    """Return everything under a folder, hidden or not: bytes of files, and what else there is."""
    return dict(_content(folder))


def _content(folder: Path) -> Iterator[tuple[str, bytes | str]]:
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            yield name, f"link to {path.readlink()}"
        else:
            yield name, path.read_bytes() if path.is_file() else "folder"
