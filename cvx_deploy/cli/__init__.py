"""The command line: parse, call one function, print.

Results go to stdout, progress and notes to stderr. With ``--json`` stdout holds one JSON object and nothing else, on
failure too. Exit codes: 0 done, 1 a stated failure, 2 wrong usage, 130 interrupted. Heavy imports happen inside the
commands, so that ``--help`` is instant.
"""

from cvx_deploy.cli import bundles, checkpoints, checks, engines, measures, quantize, videos
from cvx_deploy.cli.entry import main
from cvx_deploy.cli.group import cli

__all__ = ["bundles", "checkpoints", "checks", "cli", "engines", "main", "measures", "quantize", "videos"]
