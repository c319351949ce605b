"""From the shell and back: signals, failures, exit codes."""

import json
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from cvx_deploy.cli.group import cli
from cvx_deploy.errors import CvxError


def main() -> NoReturn:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that staged files are swept up
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell has it for what it runs in the background
        signal.signal(signal.SIGINT, interrupt)
    try:
        try:
            code = cli.main(prog_name="cvx-deploy", standalone_mode=False)
        except (Exception, KeyboardInterrupt) as error:
            # An extension that is interrupted while it is imported raises an error of its own.
            code = _interrupted() if interrupts else _failed(error)
    except BrokenPipeError:
        _drop_stdout()
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _failed(error: BaseException) -> int:
    """Say what went wrong and return the exit code; an error of the program itself is raised again."""
    if isinstance(error, click.ClickException):
        _fail(type(error).__name__, error.format_message(), "see --help")
        error.show()
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _interrupted()
    if isinstance(error, UnicodeEncodeError):
        error = CvxError(f"{error.object!r} is not UTF-8", fix="use a name, or a prompt, that is")
    elif isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        place = "the output" if error.filename is None else os.fsdecode(error.filename)
        error = CvxError(f"{place}: {error.strerror or error}", fix="check the path, its permissions and its disk")
        try:
            sys.stdout.flush()
        except OSError:
            _drop_stdout()
    if isinstance(error, CvxError):
        return _stated(error)
    raise error


def _interrupted() -> int:
    _fail("Interrupted", "interrupted", "run the command again")
    click.echo("interrupted", err=True)
    return 130


def _drop_stdout() -> None:
    """Let go of a reader that has gone or a disk that is full, so that the interpreter's own flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stated(error: CvxError) -> int:
    _fail(type(error).__name__, error.what, error.fix)
    click.echo("error: " + " ".join(str(error).splitlines()), err=True)
    return 1


def _fail(kind: str, what: str, fix: str) -> None:
    """Print the one JSON object of a command that was asked for one and has failed."""
    if "--json" in sys.argv:
        click.echo(json.dumps({"error": {"type": kind, "what": what, "fix": fix}}))
