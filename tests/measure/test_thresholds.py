"""Limits of quantized bundles are near what was measured: they fail nothing that is right, and pass nothing else."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from cvx_deploy.measure.thresholds import ATTENTION, THRESHOLDS, Thresholds, coarsest
from tests.conftest import ROOT

MEASURED = json.loads((ROOT / "benchmarks" / "results" / "quantization.json").read_text())["outcomes"]
ROWS = {
    "int8": "int8/fp32",
    "int8wo": "int8wo/fp32",
    "int4wo": "int4wo/fp32",
    "fp8": "fp8/fp32",
    ATTENTION: "fp8/fp32+attention",
}
DECIBELS = (2.5, 4.0)
"""How far a limit lies below the lower quartile of 200 videos."""
TIMES = (1.9, 2.6)
"""How often what was measured goes into the limit of an error."""


def is_near(limits: Thresholds, measured: dict[str, Any]) -> bool:
    """Whether a row keeps the margins that it says it has."""
    below = measured["psnr_quartiles"][0] - limits.psnr
    times = limits.relative_l2 / measured["transformer"][1]
    return DECIBELS[0] <= below <= DECIBELS[1] and TIMES[0] <= times <= TIMES[1]


@pytest.mark.parametrize("row", ROWS)
def test_limits_follow_what_was_measured(row: str) -> None:
    (measured,) = (outcome for outcome in MEASURED if outcome["precision"] == ROWS[row])
    assert measured["count"] == 200
    assert is_near(THRESHOLDS[row], measured)
    loose, tight = replace(THRESHOLDS[row], psnr=17.0), replace(THRESHOLDS[row], psnr=measured["psnr"])
    assert not is_near(loose, measured), "the twin: what 17 dB passes is another video"
    assert not is_near(tight, measured)


def test_a_finer_row_passes_a_coarser_ones_limits() -> None:
    order = ["fp32", "fp16", "int8wo", "bf16", "int8", "fp8", ATTENTION, "int4wo"]
    assert [coarsest(order[: end + 1]) for end in range(len(order))] == order
    for finer, wider in itertools.pairwise(order[:3]):
        for name in ("relative_max", "relative_l2", "drift", "flicker"):
            assert getattr(THRESHOLDS[finer], name) < getattr(THRESHOLDS[wider], name)
