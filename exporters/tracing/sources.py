"""The package's own files that a module is made of: itself and all it imports, however deep.

The package itself is not among them: it offers everything, and what the code here takes from it is its version.
"""

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).parents[2]


@functools.cache
def sources_of(*modules: str) -> tuple[Path, ...]:
    """Return the files of modules of this package, and of every module of it that they import, in order of name."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is not None and name not in found:
            found[name] = path
            waiting += _imported_by(path)
    return tuple(found[name] for name in sorted(found))


def _file_of(module: str) -> Path | None:
    """Return where a module of the package lies; None for what is none of its modules."""
    top, *rest = module.split(".")
    if top != PACKAGE.name or not rest:
        return None
    place = PACKAGE.joinpath(*rest)
    return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)


def _imported_by(path: Path) -> list[str]:
    """Return all that a file imports, wherever in it; a name imported from a package may be a module of it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
