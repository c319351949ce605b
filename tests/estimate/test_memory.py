"""Predicted memory against what was measured: compiled plans, ONNX Runtime's sessions, and sessions of this run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec import convert

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.estimate.memory import Network, cpu_peak, gpu_needs, tiled
from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.miniatures import miniature
from cvx_deploy.shape import Shape
from tests.conftest import ROOT, Exported, Tiny
from tests.families.test_architecture import read
from tests.tolerances import PLANNED_MEMORY

MEASURED: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "plan_memory.json").read_text())
SCRIPT = ROOT / "benchmarks" / "plan_memory.py"
NETWORKS: dict[str, Network] = {
    "text_encoder": "text_encoder",
    "modulation": "modulation",
    "transformer": "transformer",
    "vae_decoder": "vae_decoder",
    "vae_decoder_first": "vae_decoder",
}
ENGINES = [row for row in MEASURED["engines"] if row["network"] in NETWORKS]


def named(row: dict[str, Any]) -> str:
    return " ".join(str(row[key]) for key in ("checkpoint", "network", "shape", "batch") if key in row)


def architecture(name: str) -> Architecture:
    return convert(MEASURED["architectures"][name], Architecture)


@pytest.mark.parametrize("row", ENGINES, ids=named)
def test_activations_of_compiled_plans_are_predicted(row: dict[str, Any]) -> None:
    needs = gpu_needs(architecture("5b-wide"), Shape.parse(row["shape"]), "bf16", "bf16", row["batch"])
    found = needs[NETWORKS[row["network"]]]
    assert found.activations == pytest.approx(row["activations"], rel=PLANNED_MEMORY)


@pytest.mark.parametrize("row", ENGINES, ids=named)
def test_weights_of_compiled_plans_are_predicted(row: dict[str, Any]) -> None:
    shape = Shape.parse(row["shape"])
    found = gpu_needs(architecture("5b-wide"), shape, "bf16", "bf16", row["batch"])[NETWORKS[row["network"]]]
    engines = 2 if row["network"] == "vae_decoder_first" else 1  # the first chunk's, and the next one's
    assert found.weights / engines == pytest.approx(row["weights"], rel=0.01)


@pytest.mark.parametrize("row", MEASURED["sessions"], ids=named)
def test_memory_of_measured_sessions_is_predicted(row: dict[str, Any]) -> None:
    predicted = cpu_peak(architecture(row["checkpoint"]), Shape.parse(row["shape"]), row["batch"])
    assert predicted[NETWORKS[row["network"]]] == pytest.approx(row["peak"], rel=PLANNED_MEMORY)


@pytest.mark.parametrize("built", ["text_encoder", "vae_decoder_first"])
def test_activations_of_engines_built_at_the_published_size_are_predicted(built: str) -> None:
    """The transformer's engine there is one without today's rewrites, which need fewer activations."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "build.json").read_text())["networks"][built]
    needs = gpu_needs(Architecture.of_model(MODELS["5b"]), Shape(49, 480, 720), "bf16", "bf16", 2)
    assert needs[NETWORKS[built]].activations == pytest.approx(measured["activation_bytes"], rel=PLANNED_MEMORY)


def test_a_prediction_for_twice_the_pixels_would_fail() -> None:
    """The twin: the model is not so loose that another shape's figures pass."""
    for row in MEASURED["sessions"]:
        if row["network"] == "vae_decoder" and row["checkpoint"] == "5b-wide":
            shape = Shape.parse(row["shape"])
            larger = Shape(shape.frames, 2 * shape.height, shape.width)
            predicted = cpu_peak(architecture(row["checkpoint"]), larger, row["batch"])["vae_decoder"]
            assert predicted != pytest.approx(row["peak"], rel=PLANNED_MEMORY)


def peak_here(bundle: Bundle, network: str, batch: int) -> int:
    words = [sys.executable, str(SCRIPT), "--session", str(bundle.path), network, str(batch)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


@pytest.mark.parametrize("network", ["text_encoder", "transformer", "vae_decoder"])
def test_sessions_of_this_machine_take_what_is_predicted(network: Network, tiny: Tiny, exported: Exported) -> None:
    bundle = exported("5b")
    batch = 2 if network == "transformer" else 1
    predicted = cpu_peak(read(tiny("5b")), bundle.shape, batch)[network]
    assert predicted == pytest.approx(peak_here(bundle, network, batch), rel=PLANNED_MEMORY)


def test_the_miniature_takes_what_is_predicted() -> None:
    bundle = Bundle.open(miniature("mini"))
    predicted = cpu_peak(read(Path(bundle.path)), bundle.shape, 2)["transformer"]
    assert predicted == pytest.approx(peak_here(bundle, "transformer", 2), rel=PLANNED_MEMORY)


def test_a_video_of_one_chunk_has_no_state() -> None:
    known = Architecture.of_model(MODELS["5b"])
    assert gpu_needs(known, Shape(9, 480, 720), "bf16", "bf16", 2)["vae_decoder"].state == 0
    assert gpu_needs(known, Shape(17, 480, 720), "bf16", "bf16", 2)["vae_decoder"].state > 0


def test_tiles_need_a_quarter_of_the_state() -> None:
    known, shape = Architecture.of_model(MODELS["5b"]), Shape(49, 480, 720)
    whole, tile = (gpu_needs(known, at, "fp16", "fp16", 2)["vae_decoder"].state for at in (shape, tiled(shape)))
    assert whole == 4 * tile
    assert whole == 2 * 2_809_382_400  # FACTS: 2.8 GB of caches at 480x720 in fp16; one set is read, one is written
