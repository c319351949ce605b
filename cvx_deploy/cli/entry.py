"""From the shell and back: signals, failures, exit codes.

Nothing but the standard library is imported before `main` runs, so that Ctrl-C in the first second is heard.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import traceback
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import click

    from cvx_deploy.errors import CvxError

_LONGEST_FIX = 4000  # a fix is a command that is to be copied whole, and may name several files


def main() -> NoReturn:
    """Run the command line and exit."""
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    for number in (signal.SIGTERM, signal.SIGHUP):
        _handle(number, lambda number, _: sys.exit(128 + number))  # so that staged files are swept up
    _handle(signal.SIGINT, interrupt)
    try:
        code = _run()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException as error:
        # An extension that is interrupted while it is imported raises an error of its own.
        code = _interrupted() if interrupts else _failed(error)
    _flush()
    _handle(signal.SIGINT, signal.SIG_DFL)  # while the interpreter ends there is nothing left to sweep up
    sys.exit(code)


def _handle(number: int, handler: "signal._HANDLER") -> None:
    """Handle a signal, unless it is ignored, as a shell has it for what it runs in the background."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)


def _run() -> int:
    """Run the command that the arguments name, and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that a terminal cannot spell is no failure
    if not debugging():
        _hush()
    from cvx_deploy.cli import cli

    code = cli.main(prog_name="cvx-deploy", standalone_mode=False)
    return code if isinstance(code, int) else 0


def debugging() -> bool:
    """Whether tracebacks, and what libraries say, are asked for: with ``--debug`` or CVX_DEBUG=1."""
    before_the_command = itertools.takewhile(lambda word: word.startswith("-"), sys.argv[1:])
    return "--debug" in before_the_command or os.environ.get("CVX_DEBUG", "0") not in ("", "0")


def _hush() -> None:
    """Keep the warnings and notes of libraries to themselves: what a user must know this program says itself."""
    import logging
    import warnings

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


def _failed(error: BaseException) -> int:
    """Say what went wrong in one line and return the exit code."""
    if debugging():
        traceback.print_exception(error)
    import click

    if isinstance(error, click.ClickException):
        return _wrong_usage(error)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _interrupted()
    if isinstance(error, BrokenPipeError):
        drop_stdout()
        return 1
    return _stated(_as_stated(error))


def _as_stated(error: BaseException) -> "CvxError":
    """Return any failure as a stated one."""
    from cvx_deploy.errors import CvxError, OutOfMemoryError
    from cvx_deploy.terminal import reason

    if isinstance(error, CvxError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemoryError(
            "there is not enough memory for this",
            fix="end other programs, or ask for a smaller shape or a precision of fewer bytes",
        )
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return CvxError(f"{error.object!r} is not UTF-8", fix="use a name, or a prompt, that is")
    if isinstance(error, OSError):
        place = "the output" if error.filename is None else os.fsdecode(error.filename)
        return CvxError(f"{place}: {error.strerror or error}", fix="check the path, its permissions and its disk")
    return CvxError(
        f"a fault of cvx-deploy: {type(error).__name__} in {_place(error)}: {reason(error)}",
        fix="report it, with what the same words print after cvx-deploy --debug",
    )


def _place(error: BaseException) -> str:
    """Return where in this program an error came up."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "cvx_deploy" in frame.filename]
    if not frames:
        return "an unknown place"
    return f"{frames[-1].filename.rpartition('cvx_deploy' + os.sep)[2]}:{frames[-1].lineno}"


def _wrong_usage(error: "click.ClickException") -> int:
    import click

    from cvx_deploy.terminal import safe

    what = safe(error.format_message())
    _fail(type(error).__name__, error.format_message(), "see --help")
    if isinstance(error, click.UsageError):
        click.UsageError(what, ctx=error.ctx).show()
    else:
        click.ClickException(what).show()
    return error.exit_code


def _interrupted() -> int:
    _fail("Interrupted", "interrupted", "run the command again")
    _say("interrupted")
    return 130


def _flush() -> None:
    """Write out what is left, so that the interpreter's own attempt cannot fail."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        drop_stdout()


def drop_stdout() -> None:
    """Let go of a reader that has gone or a disk that is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stated(error: "CvxError") -> int:
    _fail(type(error).__name__, error.what, error.fix)
    _say(error_line(error.what, error.fix))
    return 1


def error_line(what: str, fix: str) -> str:
    """Return a failure as the one line that a person reads."""
    from cvx_deploy.terminal import safe

    return f"error: {safe(what, 1000)}. fix: {safe(fix, _LONGEST_FIX)}."


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody listens
        print(line, file=sys.stderr, flush=True)


def _fail(kind: str, what: str, fix: str) -> None:
    """Print the one JSON object of a command that was asked for one and has failed."""
    if "--json" not in sys.argv:
        return
    try:
        print(json.dumps({"error": {"type": kind, "what": what, "fix": fix}}), flush=True)
    except (OSError, ValueError):
        drop_stdout()
