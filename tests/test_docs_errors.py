"""The page of symptoms quotes messages that the program has."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

QUOTED = re.compile(r'^\| "([^"]+)"', re.MULTILINE)


def texts() -> Iterator[str]:
    """Yield every string of the sources, a form's holes as ``PATH``."""
    for place in ("cvx_deploy", "exporters", "examples"):
        for path in sorted((ROOT / place).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "PATH" for part in node.values]
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


SOURCES = "\n".join(texts())
QUOTES = QUOTED.findall((ROOT / "docs" / "errors.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_is_in_the_code(quote: str) -> None:
    assert quote in SOURCES


def test_twin_a_message_that_nobody_prints_is_not_found() -> None:
    assert "the flux capacitor is out of tune" not in SOURCES
    assert len(QUOTES) > 20
