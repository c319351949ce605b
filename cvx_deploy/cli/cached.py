"""The command that shows what is kept in the user's cache, and clears it."""

from typing import Any

import click

from cvx_deploy.cli.group import cli
from cvx_deploy.cli.options import Result, reporting
from cvx_deploy.progress import Progress


@cli.command("cache")
@click.option("--clear", is_flag=True, help="Delete all of it.")
@reporting
def cache(clear: bool, progress: Progress) -> Result:
    """Show what is kept in the user's cache folder, and clear it.

    Everything in it is made again where it is needed: networks that were traced, hashes of large files, which engine is
    the fastest here. It lies in ~/.cache/cvx-deploy, or where CVX_CACHE_DIR or XDG_CACHE_HOME say.

    \b
    Examples:
      cvx-deploy cache
      cvx-deploy cache --clear
    """
    from cvx_deploy.files import cache_root
    from cvx_deploy.kept import clear_cache, what_is_kept
    from cvx_deploy.measure.units import size_text

    parts = what_is_kept()
    total = sum(part.size for part in parts)
    values: dict[str, Any] = {
        "folder": str(cache_root()),
        "parts": {part.name: {"files": part.files, "bytes": part.size, "what": part.what} for part in parts},
        "bytes": total,
        "cleared": clear,
    }
    lines = [f"{part.name:<8}  {size_text(part.size):>8}  {part.files:>5} files  {part.what}" for part in parts]
    if clear:
        clear_cache()
        return values, f"{size_text(total)} deleted from {cache_root()}"
    return values, "\n".join([*lines, f"{size_text(total)} in {cache_root()}"])
