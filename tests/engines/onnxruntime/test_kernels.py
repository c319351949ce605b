"""How many quantized layers ONNX Runtime runs as such: ``build --engine onnxruntime`` counts them and turns red."""

import json
import shutil
from pathlib import Path

import pytest

from tests.command import Outcome, cvx
from tests.conftest import Tiny


@pytest.fixture(scope="module")
def bundle(tiny: Tiny, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "5b"
    assert export(tiny, table, "int8/fp32", path).code == 0
    return path


def export(tiny: Tiny, table: Path, precision: str, path: Path) -> Outcome:
    calibration = [] if "wo" in precision else ["--calibration", table]
    words = ["--model", "5b", "--checkpoint", tiny("5b"), "--frames", 9, "--precision", precision, *calibration]
    return cvx("export", *words, "--output", path, "--quiet")


def build(path: Path) -> Outcome:
    return cvx("build", "--bundle", path, "--engine", "onnxruntime", "--json", "--quiet")


def test_every_int8_layer_is_one_integer_kernel(bundle: Path) -> None:
    outcome = build(bundle)
    assert outcome.code == 0, outcome
    networks = json.loads(outcome.out)["networks"]
    assert networks["transformer"]["kernels"] == {"MatMulIntegerToFloat": 18}
    assert networks["text_encoder"]["kernels"] == {"MatMulNBits": 14}
    assert networks["modulation"]["kernels"] is None
    assert "18 MatMulIntegerToFloat" in cvx("verify", "--bundle", bundle, "--load").out


def test_weights_that_stay_in_their_file_are_counted(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvx_deploy.engines.onnxruntime.graphs.LARGE_NETWORK", 0)
    monkeypatch.setattr("cvx_deploy.graph.streamed._LARGE", 1)
    networks = json.loads(build(bundle).out)["networks"]
    assert networks["text_encoder"]["kernels"] == {"DequantizeLinear": 14}
    assert networks["transformer"]["kernels"] == {"MatMulIntegerToFloat": 18}, "products of 8 bits need constants"


def test_four_bits_are_weighed_and_counted_too(tiny: Tiny, table: Path, tmp_path: Path) -> None:
    assert export(tiny, table, "int4wo/fp32", tmp_path / "5b").code == 0
    outcome = build(tmp_path / "5b")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["networks"]["transformer"]["kernels"] == {"MatMulNBits": 18}


def test_layers_that_are_multiplied_in_float32_are_red(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cvx_deploy.engines.onnxruntime.backend._disabled",
        lambda _: ["MatMulAddFusion", "QDQSelectorActionTransformer"],
    )
    outcome = build(bundle)
    assert "transformer" in outcome.failure()
    (finding,) = json.loads(outcome.out)["networks"]["transformer"]["findings"]
    assert finding == "ONNX Runtime multiplies 18 of its 18 quantized layers in float32"


def turned(bundle: Path, folder: Path, old: str, new: str) -> Path:
    """Return a copy of a bundle whose manifest says something else."""
    copy = Path(shutil.copytree(bundle, folder / new))
    text = (copy / "bundle.json").read_text()
    (copy / "bundle.json").write_text(text.replace(f'"{old}"', f'"{new}"'))
    return copy


def test_what_onnxruntime_cannot_run_fast_is_refused_with_what_can(bundle: Path, tmp_path: Path) -> None:
    fp8, bf16 = turned(bundle, tmp_path, "int8", "fp8"), turned(bundle, tmp_path, "fp32", "bf16")
    for path, words in {
        fp8: ("multiplies in fp8", "int8/fp32", "--engine tensorrt"),
        bf16: ("computes in bf16", "--engine openvino", "--precision fp32"),
    }.items():
        failure = build(path).failure()
        assert all(word in failure for word in words), failure


def test_openvino_refuses_fp8_with_what_it_can_do(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    fp8 = turned(bundle, tmp_path, "int8", "fp8")
    output = ("--prompt", "a ball", "--output", tmp_path / "ball.mp4")
    failure = cvx("run", "--bundle", fp8, *output, "--engine", "openvino").failure()
    assert all(word in failure for word in ("multiplies in fp8", "int8/fp32", "--engine tensorrt")), failure


def test_a_gpu_without_fp8_is_refused_with_what_it_can_do(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    fp8 = turned(bundle, tmp_path, "int8", "fp8")
    failure = cvx("build", "--bundle", fp8, "--engine", "tensorrt-rtx", "--target", "sm86").failure()
    assert all(word in failure for word in ("sm86", "int8", "bf16", "sm89")), failure
    assert not (fp8 / "engines").exists()
