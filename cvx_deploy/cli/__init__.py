"""The command line: parse, call one function, print.

Results go to stdout, progress and notes to stderr. With ``--json`` stdout holds one JSON object and nothing else, on
failure too. Exit codes: 0 done, 1 a stated failure, 2 wrong usage, 130 interrupted. Heavy imports happen inside the
commands, so that ``--help`` is instant.
"""

from typing import TYPE_CHECKING, Any

from cvx_deploy.cli.entry import main

if TYPE_CHECKING:
    from cvx_deploy.cli.group import cli

__all__ = ["cli", "main"]


def __getattr__(name: str) -> Any:
    """Import the commands only when they are asked for: `main` hears Ctrl-C before that takes its time."""
    if name != "cli":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cvx_deploy.cli import (  # noqa: F401
        batch,
        bundles,
        cache,
        cached,
        checkpoints,
        checks,
        engines,
        measures,
        quantize,
        serve,
        triton,
        videos,
    )
    from cvx_deploy.cli.group import cli

    return cli
