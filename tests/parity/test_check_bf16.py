"""A bundle in bfloat16, its caches too, is held against eager float32 by the limits of bfloat16."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.registry import SPECS
from cvx_deploy.parity.ladder import Rung
from tests.conftest import Exported, Tiny
from tests.parity.corrupt import corrupted
from tests.parity.test_check import climbed, failing

pytestmark = pytest.mark.nightly
CHUNKED = {"vae_decoder_first", "vae_decoder_next", "vae_encoder", "vae_encoder_next"}


@pytest.fixture
def bundle(exported: Exported) -> Bundle:
    """One whose VAE hands caches on, from chunk to chunk."""
    found = exported("5b", precision="bf16", frames=17)
    caches = {spec.dtype for spec in found.network("vae_decoder_next").inputs[1:]}
    assert caches == {"bfloat16"}
    return found


@pytest.fixture(params=["onnxruntime", "openvino"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> str:
    """What runs the graphs: ONNX Runtime in float32, as on a CPU without bfloat16, or OpenVINO in bfloat16."""
    name: str = request.param
    if name == "onnxruntime":
        without = replace(SPECS["openvino"], obstacle=lambda _: "this CPU has no bfloat16")
        monkeypatch.setitem(SPECS, "openvino", without)
    elif obstacle := SPECS["openvino"].obstacle(bundle.manifest):
        pytest.skip(obstacle)
    return name


def held(bundle: Bundle, checkpoint: Path, straight: Bundle) -> tuple[Any, Rung]:
    found = climbed(bundle, checkpoint, straight, engine=None)
    return found, next(rung for rung in found.rungs if rung.name == "rewritten")


def test_a_bf16_bundle_is_within_the_limits_of_bf16(runner: str, bundle: Bundle, tiny: Tiny) -> None:
    found, rewritten = held(bundle, tiny("5b"), bundle)
    assert found.error is None, str(found)
    assert rewritten.precision == "bf16"
    assert rewritten.runs_on.startswith(runner)
    assert {result.network for result in rewritten.networks} >= CHUNKED


@pytest.mark.parametrize("runner", ["onnxruntime"], indirect=True)
def test_twin_a_corrupted_bf16_bundle_is_not(runner: str, bundle: Bundle, tiny: Tiny, tmp_path: Path) -> None:
    broken = corrupted(bundle, "transformer", "proj_out.weight", tmp_path)
    assert failing(held(broken, tiny("5b"), bundle)[0]) == ("rewritten", {"transformer"})
