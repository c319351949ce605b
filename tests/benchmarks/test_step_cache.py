"""The measurement of forecast steps goes on where it was cut off, and its table is that of the committed results."""

import json
import sys
from dataclasses import asdict
from typing import Any

import pytest

from cvx_deploy import Pipeline
from tests.conftest import ROOT


@pytest.fixture
def step_cache(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "report", raising=False)
    import step_cache

    return step_cache


def test_what_is_kept_is_not_measured_again(step_cache: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(step_cache, "SCHEDULERS", ("ddim",))
    monkeypatch.setattr(step_cache, "cases", lambda *_: {step_cache.FULL: {}, step_cache.FAST: {"fast": True}})
    with Pipeline.from_pretrained("mini", threads=1) as pipe:
        plan = step_cache.Plan("mini", 0, 1, 6, None, ())
        rows = list(step_cache.measured(plan, pipe, pipe, {}))
        assert [row.case for row in rows] == [step_cache.FULL, step_cache.FAST]
        assert (rows[0].psnr, rows[0].calls, rows[1].calls) == (200.0, 6, 3)
        assert rows[1].psnr < 200
        file = tmp_path / "kept.jsonl"
        file.write_text(json.dumps(asdict(rows[0])) + "\n")
        (again,) = step_cache.measured(plan, pipe, pipe, step_cache.read_rows(file))
    assert again.case == step_cache.FAST
    assert again.psnr == rows[1].psnr
    told = step_cache.summary(rows, 6)["mini, ddim"]
    assert told[step_cache.FAST]["work"] == 2.0


def test_the_page_and_the_results_show_the_same_table(step_cache: Any) -> None:
    place = ROOT / "benchmarks" / "results" / "step_cache"
    lines = step_cache.table(json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))["results"])
    assert place.with_suffix(".md").read_text(encoding="utf-8").splitlines()[: len(lines)] == lines
