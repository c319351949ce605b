"""ONNX Runtime on a GPU against itself on the CPU: every network, and whole videos."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from cvx_deploy.engines.cuda import Cuda
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from tests.conftest import Exported
from tests.gpu.test_tensorrt import assert_alike, inputs_of, outputs_of, video
from tests.tolerances import TF32_RELATIVE

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _onnxruntime_gpu(cuda: Cuda) -> None:
    """Skip without a GPU, and without the package for it."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu in the place of onnxruntime")


def test_every_network_agrees_with_the_cpu(model_name: str, exported: Exported) -> None:
    bundle = exported(model_name)
    on_cpu, on_gpu = OrtBackend(bundle), OrtBackend(bundle, device=0)
    for role in bundle.manifest.shapes[0].networks:
        inputs = inputs_of(bundle, role, 1)
        expected, found = outputs_of(on_cpu, role, inputs, 1), outputs_of(on_gpu, role, inputs, 1)
        for name, values in expected.items():
            assert np.abs(found[name] - values).max() / np.abs(values).max() < TF32_RELATIVE, f"{role} {name}"


@pytest.mark.parametrize("name", ["2b", "1.5-5b"])
def test_whole_videos_agree_with_the_cpu(name: str, exported: Exported, tmp_path: Path) -> None:
    bundle = exported(name)
    expected = video(OrtBackend(bundle), tmp_path)
    assert_alike(video(OrtBackend(bundle, device=0), tmp_path), expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_runs(precision: str, exported: Exported, tmp_path: Path) -> None:
    pixels = video(OrtBackend(exported("2b", precision=precision), device=0), tmp_path)
    assert np.isfinite(pixels).all()
