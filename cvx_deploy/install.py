"""How to install what is missing, in the way this program was installed itself."""

import importlib.metadata
import json
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

_NAME = "cvx-deploy"


def pip_install(extra: str) -> str:
    """Return the pip command that adds an extra, and works where this program came from.

    That is a folder, a file or a repository, as pip noted it down (PEP 610), a checkout that was never installed, or an
    index.
    """
    return f"pip install {_requirement(_noted(), extra)}"


def _noted() -> dict[str, object]:
    """Return what pip noted down of where the program came from; nothing for an index."""
    try:
        text = importlib.metadata.distribution(_NAME).read_text("direct_url.json")
        noted = json.loads(text or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _requirement(noted: dict[str, object], extra: str) -> str:
    url, version = str(noted.get("url", "")), noted.get("vcs_info")
    if isinstance(version, dict):
        return shlex.quote(f"{_NAME}[{extra}] @ {version.get('vcs')}+{url}@{version.get('commit_id')}")
    parts = urlsplit(url)
    place = Path(unquote(parts.path)) if parts.scheme == "file" else _checkout()
    if parts.scheme not in ("", "file"):
        return shlex.quote(f"{_NAME}[{extra}] @ {url}")
    if place is None or not place.exists():
        return f'"{_NAME}[{extra}]"'
    editable = noted.get("dir_info")
    flag = "-e " if isinstance(editable, dict) and editable.get("editable") else ""
    return f"{flag}{shlex.quote(f'{place}[{extra}]')}"


def _checkout() -> Path | None:
    """Return the folder of the sources, where the program runs from them."""
    folder = Path(__file__).resolve().parent.parent
    return folder if (folder / "pyproject.toml").is_file() else None
