"""Where ONNX Runtime puts every network's operators on CUDA: on the libraries of a GPU, or on stand-ins for them.

``CVX_CUDA_RUNTIME`` names a folder with ``site``, where an onnxruntime-gpu is installed, and ``lib``, where the CUDA
libraries are that it loads; a GPU is not needed where those are stand-ins that count allocations and launch nothing.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from cvx_deploy.families.cogvideox.models import MODELS
from tests.conftest import Exported

ROOT = Path(__file__).parents[2]
RUNTIME = os.environ.get("CVX_CUDA_RUNTIME")
pytestmark = pytest.mark.skipif(RUNTIME is None, reason="CVX_CUDA_RUNTIME names no folder with CUDA's libraries")


def seen(folder: Path, role: str, *, as_exported: bool = False) -> dict[str, Any]:
    """Load a network in a process of its own, and return where its operators are."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import cuda_placement

    asked = argparse.Namespace(runtime=Path(str(RUNTIME)), without_cudnn=False, run=[], as_exported=as_exported)
    found: dict[str, Any] = cuda_placement.seen(folder, role, asked)
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_network_loads_and_leaves_only_shapes_to_the_cpu(name: str, precision: str, exported: Exported) -> None:
    bundle = exported(name, precision=precision)
    for role in bundle.manifest.shapes[0].networks:
        found = seen(bundle.path, role)
        assert "failed" not in found, found
        assert found["cpu_other_than_shapes"] == []
        if role == "transformer":
            assert found["cuda"]["Attention"] > 0
            assert found["cuda"]["LayerNormalization"] > 0


def test_twin_a_decoder_whose_frames_move_in_bfloat16_does_not_load(exported: Exported) -> None:
    found = seen(exported("5b", precision="bf16").path, "vae_decoder_first", as_exported=True)
    assert "Resize" in found["failed"]
