"""A parity check as JSON, JUnit XML, Markdown and picture, and as an exit code."""

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from cvx_deploy.errors import ParityError
from cvx_deploy.measure.difference import difference, drift, video_difference
from cvx_deploy.measure.thresholds import THRESHOLDS
from cvx_deploy.miniatures import miniature
from cvx_deploy.parity.divergence import Layer
from cvx_deploy.parity.forms import junit, markdown, save_frames, write_report
from cvx_deploy.parity.ladder import Divergence, NetworkResult, Parity, Rung
from cvx_deploy.pytest_plugin import Hold, parity  # noqa: F401
from tests.command import cvx
from tests.conftest import ROOT

LIMITS = THRESHOLDS["fp32"]
LAYER = Divergence("transformer", "9x48x48", (Layer("blocks.1.to_k/MatMul_5", 0.7),))


def found(*, wrong: float = 0.0) -> Parity:
    """Return a check of one network on two rungs, the second off by as much."""
    right = np.ones((2, 3), np.float32)
    apart = difference("noise_pred", right + wrong * np.eye(2, 3), right)
    result = NetworkResult("transformer", "9x48x48", "batch 2", apart, apart.beyond(LIMITS))
    skipped = Rung("own-type", None, "PyTorch", skipped="stored in float32")
    rungs = (Rung("eager", "fp32", "PyTorch"), skipped, Rung("rewritten", "fp32", "onnxruntime", networks=[result]))
    whole = Parity("engines/5b", "checkpoints/5b", "onnxruntime", "networks", "fp32", {"seed": 0}, rungs)
    return replace(whole, divergence=(LAYER,)) if wrong else whole


def test_figures_are_those_of_their_definitions() -> None:
    one = difference("x", np.array([3.0, 4.5]), np.array([3.0, 4.0]))
    assert (one.max_abs, one.relative_max, one.relative_l2) == (0.5, 0.125, 0.1)
    assert one.cosine == pytest.approx((9 + 18) / (5 * np.hypot(3, 4.5)))
    assert drift([np.ones(2), np.zeros(2)], [np.ones(2), np.ones(2)]) == (0.0, 1.0)


@pytest.mark.parametrize("bad", [np.array([1.0, np.nan]), np.array([1.0, np.inf]), np.ones(3)])
def test_what_is_not_finite_or_of_another_shape_breaks_every_limit(bad: np.ndarray) -> None:
    assert difference("x", bad, np.ones(2)).beyond(THRESHOLDS["int4wo"])


def test_videos_differ_by_noise_by_structure_and_by_flicker() -> None:
    video = np.random.default_rng(0).random((4, 16, 16, 3), np.float32)
    same = video_difference(video, video)
    assert not same.beyond(LIMITS)
    brighter = video_difference(video + np.float32(0.01), video)
    assert brighter.psnr == pytest.approx(40, abs=0.01)
    assert brighter.flicker < 1e-6, "a constant error does not flicker"
    flickering = video + np.float32(0.01) * np.array([1, -1, 1, -1], np.float32)[:, None, None, None]
    assert video_difference(flickering, video).flicker == pytest.approx(0.02, abs=1e-4)


def test_a_failure_names_rung_case_limit_and_layer() -> None:
    error = found(wrong=0.5).error
    assert isinstance(error, ParityError)
    for word in ("rung rewritten", "transformer at 9x48x48, batch 2", "relative_max", "blocks.1.to_k/MatMul_5"):
        assert word in error.what
    assert found().error is None


def test_json_is_json_where_nothing_is_finite() -> None:
    values = json.loads(json.dumps(found(wrong=float("nan")).as_dict(), allow_nan=False))
    assert values["passed"] is False
    assert values["first_failing"] == "rewritten"
    assert values["rungs"][2]["networks"][0]["worst"]["max_abs"] is None


def test_junit_counts_failures_and_skips() -> None:
    root = ElementTree.fromstring(junit(found(wrong=0.5)))
    counted = {suite.get("name"): (suite.get("failures"), suite.get("skipped")) for suite in root}
    assert counted == {"eager": ("0", "0"), "own-type": ("0", "1"), "rewritten": ("1", "0")}
    assert len(root.findall(".//failure")) == 1


def test_markdown_has_a_row_for_every_run() -> None:
    assert "| transformer | 9x48x48, batch 2 | noise_pred |" in markdown(found())
    assert "**engines/5b fails at the rung rewritten" in markdown(found(wrong=0.5))


def test_frames_show_the_difference_amplified(tmp_path: Path) -> None:
    eager = np.full((2, 8, 8, 3), 0.5, np.float32)
    engine = eager.copy()
    engine[0, 0, 0] += 0.1
    assert save_frames(tmp_path / "contact.png", eager, engine) == pytest.approx(5)
    with Image.open(tmp_path / "contact.png") as sheet:
        assert sheet.getpixel((0, 2 * 9)) == (255, 255, 255)
        assert sheet.getpixel((4, 2 * 9 + 4)) == (128, 128, 128)


@pytest.mark.parametrize(("wrong", "code"), [(0.0, 0), (0.5, 1)])
def test_the_command_exits_by_what_was_found(wrong: float, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvx_deploy.testing.parity", lambda *_: found(wrong=wrong))
    done = cvx("check", "--model", "mini", "--json")
    assert done.code == code
    assert json.loads(done.out)["passed"] is (code == 0)
    if code:
        assert "rung rewritten" in done.failure()


def test_reports_are_written_together(tmp_path: Path) -> None:
    assert {path.name for path in write_report(found(), tmp_path)} == {"check.json", "junit.xml", "check.md"}


def test_the_miniature_passes_and_leaves_its_reports(parity: Hold, tmp_path: Path) -> None:  # noqa: F811
    parity(miniature("mini"), steps=2)
    kept = {path.name for path in (tmp_path / "parity").iterdir()}
    assert kept == {"check.json", "junit.xml", "check.md", "contact.png"}
    assert json.loads((tmp_path / "parity" / "check.json").read_text())["first_failing"] is None


@pytest.mark.slow
def test_the_miniature_for_images_passes(parity: Hold) -> None:  # noqa: F811
    parity(miniature("mini-i2v"), steps=2)


def test_the_workflow_gives_the_command_options_that_it_has() -> None:
    text = (ROOT / ".github" / "workflows" / "parity.yml").read_text()
    options = set(re.findall(r"--(\w+)", text[text.index("cvx-deploy check") : text.index("- if: always()")]))
    assert options == {"bundle", "checkpoint", "level", "engine", "output"}
    assert all(f"--{option}" in cvx("check", "--help").out for option in options)
