"""The README's table is that of the committed results."""

import sys

import pytest

from cvx_deploy.bench.results import read_results
from tests.conftest import ROOT


def test_readme_shows_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "readme", raising=False)
    import readme

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = read_results(readme.FOLDER / "bench.json")
    assert readme.with_block(text, results) == text
    assert readme.with_block(text.replace(" eager |", " other |"), results) == text
    page = (readme.FOLDER / "bench.md").read_text(encoding="utf-8")
    assert readme.forms(results)["bench.md"] == page, "run: python benchmarks/readme.py --keep"
