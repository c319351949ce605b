"""A video with steps forecast is held against the engine's own full run, by limits of its own."""

from pathlib import Path
from typing import Any

import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.registry import open_backend
from cvx_deploy.measure.difference import VideoDifference
from cvx_deploy.miniatures import miniature
from cvx_deploy.parity.forecast import forecast_result
from cvx_deploy.parity.forms import junit, markdown
from cvx_deploy.parity.ladder import ForecastResult, Parity, Rung
from cvx_deploy.pipeline.forecast import Forecaster
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.progress import SilentProgress
from tests.command import cvx


def held(folder: Path, steps: int = 24) -> ForecastResult:
    request = RunRequest(("a red circle moves to the right",), steps=steps, guidance_scale=2.0, seed=3)
    opened = open_backend("onnxruntime", Bundle.open(miniature("mini")))
    return forecast_result(opened, request, folder, SilentProgress())


def test_fast_is_within_its_limits(tmp_path: Path) -> None:
    found = held(tmp_path)
    assert found.broken == (), found
    assert "against the engine's own full run" in str(found)
    assert "12 steps run, 12 forecast" in str(found)


def test_twin_a_sign_turned_is_beyond_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Forecaster.output
    monkeypatch.setattr(Forecaster, "output", lambda self, index, latents: -output(self, index, latents))
    assert any(line.startswith("psnr") for line in held(tmp_path).broken)


def test_a_run_that_cannot_be_made_is_a_failure(tmp_path: Path) -> None:
    assert "2 steps are too few" in held(tmp_path, steps=2).broken[0]


def parity(*forecasts: ForecastResult) -> Parity:
    told: dict[str, Any] = {"rungs": (Rung("eager", "fp32", "PyTorch"),), "conditions": {}, "forecasts": forecasts}
    return Parity("bundle", "checkpoint", "onnxruntime", "video", "fp32", **told)


def test_a_strayed_forecast_fails_a_check_and_is_not_called_a_rung() -> None:
    far = VideoDifference(20.0, 0.5, 0.1)
    strayed = ForecastResult("9x48x48", far, "25 steps run, 25 forecast", ("psnr 20 is below 46",))
    fine = ForecastResult("9x48x48", VideoDifference(60.0, 1.0, 0.0), "25 steps run, 25 forecast", ())
    wrong, right = parity(strayed), parity(fine)
    assert wrong.first_failing is None
    assert "do not stand --fast: at 9x48x48 psnr 20 is below 46" in str(wrong.error)
    assert right.error is None
    assert (wrong.as_dict()["passed"], right.as_dict()["passed"]) == (False, True)
    for text in (markdown(wrong), junit(wrong), str(wrong)):
        assert "--fast" in text
    assert 'failures="1"' in junit(wrong)
    assert "which is no parity" in markdown(right)


def test_fast_is_judged_by_whole_videos_only() -> None:
    assert cvx("check", "--model", "mini", "--fast", "--level", "networks").code == 2
