"""The table of docs/quantization.md is that of the committed results."""

import json
import sys

import pytest

from tests.conftest import ROOT


def test_docs_and_results_show_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "report", raising=False)
    import quantization

    outcomes = json.loads(quantization.RESULTS.with_suffix(".json").read_text(encoding="utf-8"))["outcomes"]
    lines = quantization.table_of([quantization.Outcome(**one) for one in outcomes])
    assert quantization.RESULTS.with_suffix(".md").read_text(encoding="utf-8").splitlines()[: len(lines)] == lines
    text = quantization.DOCS.read_text(encoding="utf-8")
    assert quantization.with_table(text, lines) == text
    assert quantization.with_table(text.replace("| int8/fp32 | ", "| int8/fp32 | 9"), lines) == text
    assert quantization.with_table(text, lines[:-1]) != text
