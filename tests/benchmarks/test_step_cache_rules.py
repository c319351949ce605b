"""Published rules as masks, and the committed pages of the step cache's benchmarks."""

import json
import sys
from typing import Any

import pytest

from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "report", raising=False)
    return __import__


def test_magcaches_mask_runs_the_first_fifth_and_skips_three_at_most(module: Any) -> None:
    rules = module("step_cache_rules")
    mask = rules.magcache([1.0] * 20)(10.0)
    assert mask[:4] == (True,) * 4
    assert mask[-1]
    assert "".join(".R"[run] for run in mask) == "RRRR...R...R...R...R"
    assert rules.magcache([1.0, 1.5] * 10)(0.1) == (True,) * 20
    assert sum(rules.of_calls(rules.magcache([1.0, 1.02, 0.97, 1.05] * 5), 10)) == pytest.approx(10, abs=2)


@pytest.mark.parametrize(
    "name", ["step_cache_rules", "step_cache_frontier", "step_cache_more", "step_cache_guidance_6"]
)
def test_the_page_and_the_results_show_the_same_table(module: Any, name: str) -> None:
    told = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]
    if name == "step_cache_rules":
        lines = module(name).table(told, 6)
    else:
        lines = module("step_cache").table(told)
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines()[: len(lines)] == lines
