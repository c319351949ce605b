"""Predicted memory against what was measured: compiled plans, ONNX Runtime's sessions, and sessions of this run."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec import convert

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.estimate import memory
from cvx_deploy.estimate.memory import NetworkName, cpu_peak, gpu_needs, tiled
from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.miniatures import miniature
from cvx_deploy.shape import Shape
from tests.conftest import ROOT, Exported, Tiny
from tests.families.test_architecture import read
from tests.tolerances import PLANNED_MEMORY

MEASURED: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "plan_memory.json").read_text())
SCRIPT = ROOT / "benchmarks" / "plan_memory.py"
NETWORKS: dict[str, NetworkName] = {
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


@dataclass(frozen=True)
class Fit:
    """One constant of `plan.memory`, the one size it is fitted to here, and the sizes that are then predicted by it.

    Attributes:
        constant: Its name; `key` where it is one of a table.
        fitted: A row of the measurements, as `named` names it.
        held_out: Rows of other sizes.
    """

    constant: str
    key: int | str | None
    fitted: str
    held_out: tuple[str, ...]


FITS = (
    Fit("_GPU_TRANSFORMER", 1, "transformer 17x256x384 1", ("transformer 49x480x720 1",)),
    Fit("_GPU_TRANSFORMER", 2, "transformer 17x256x384 2", ("transformer 49x480x720 2",)),
    Fit("_GPU_DECODER", None, "vae_decoder_first 17x256x384 2", ("vae_decoder_first 49x480x720 2",)),
    Fit(
        "CPU_DECODER",
        None,
        "5b-wide vae_decoder 9x192x256 1",
        ("5b-wide vae_decoder 9x96x128 1", "5b-tiny vae_decoder 9x80x112 1"),
    ),
    Fit("CPU_STATE", None, "5b-wide vae_decoder 17x96x128 1", ("2b-tiny vae_decoder 17x80x112 1",)),
    Fit("_CPU_TRANSFORMER", None, "2b-tiny transformer 17x80x112 2", ("5b-tiny transformer 9x80x112 2",)),
    Fit(
        "CPU_TRANSFORMER_TILED",
        None,
        "5b-wide transformer 9x384x384 2",
        ("5b-wide transformer 17x624x640 1", "5b-wide transformer 17x624x640 2"),
    ),
)
ROWS = {named(row): row for row in (*ENGINES, *MEASURED["sessions"])}


def predicted(row: dict[str, Any]) -> int:
    """Return the bytes that are predicted for a measurement: activations of an engine, the peak of a session."""
    shape, network = Shape.parse(row["shape"]), NETWORKS[row["network"]]
    if "checkpoint" in row:
        return cpu_peak(architecture(row["checkpoint"]), shape, row["batch"])[network]
    return gpu_needs(architecture("5b-wide"), shape, "bf16", "bf16", row["batch"])[network].activations


def measured(row: dict[str, Any]) -> int:
    return int(row["peak"] if "checkpoint" in row else row["activations"])


def put(monkeypatch: pytest.MonkeyPatch, fit: Fit, value: float) -> None:
    """Give a constant another value."""
    if fit.key is None:
        monkeypatch.setattr(memory, fit.constant, value)
    else:
        monkeypatch.setitem(getattr(memory, fit.constant), fit.key, value)


def fitted(monkeypatch: pytest.MonkeyPatch, fit: Fit, scale: float = 1) -> float:
    """Set a constant so that `scale` times what was measured at the one size is predicted; found by halving."""
    row = ROWS[fit.fitted]
    low, high = 0.01, 1000.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        put(monkeypatch, fit, middle)
        low, high = (middle, high) if predicted(row) < scale * measured(row) else (low, middle)
    assert predicted(row) == pytest.approx(scale * measured(row), rel=0.001)
    return low


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: f"{fit.constant}-{fit.key}")
def test_a_constant_fitted_to_one_size_predicts_the_others(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted(monkeypatch, fit)
    for name in fit.held_out:
        assert ROWS[name]["shape"] != ROWS[fit.fitted]["shape"]
        assert predicted(ROWS[name]) == pytest.approx(measured(ROWS[name]), rel=PLANNED_MEMORY), name


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: f"{fit.constant}-{fit.key}")
def test_a_constant_fitted_to_half_of_what_was_measured_would_fail(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: what is held out does depend on the constant."""
    fitted(monkeypatch, fit, 1.5)
    assert any(
        predicted(ROWS[name]) != pytest.approx(measured(ROWS[name]), rel=PLANNED_MEMORY) for name in fit.held_out
    )


@pytest.mark.parametrize("row", ENGINES, ids=named)
def test_weights_of_compiled_plans_are_predicted(row: dict[str, Any]) -> None:
    shape = Shape.parse(row["shape"])
    found = gpu_needs(architecture("5b-wide"), shape, "bf16", "bf16", row["batch"])[NETWORKS[row["network"]]]
    engines = 2 if row["network"] == "vae_decoder_first" else 1  # the first chunk's, and the next one's
    assert found.weights / engines == pytest.approx(row["weights"], rel=0.01)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_what_the_constants_were_read_off_is_reproduced(row: dict[str, Any]) -> None:
    """No prediction: that the formulas can say all that was measured at once."""
    assert predicted(row) == pytest.approx(measured(row), rel=PLANNED_MEMORY)


@pytest.mark.parametrize("built", ["text_encoder", "vae_decoder_first"])
def test_activations_of_engines_built_at_the_published_size_are_predicted(built: str) -> None:
    """The transformer's engine there is one without today's rewrites, which need fewer activations."""
    built_there = json.loads((ROOT / "benchmarks" / "results" / "build.json").read_text())["networks"][built]
    needs = gpu_needs(Architecture.of_model(MODELS["5b"]), Shape(49, 480, 720), "bf16", "bf16", 2)
    assert needs[NETWORKS[built]].activations == pytest.approx(built_there["activation_bytes"], rel=PLANNED_MEMORY)


def test_a_prediction_for_twice_the_pixels_would_fail() -> None:
    """The twin: the model is not so loose that another shape's figures pass."""
    for row in MEASURED["sessions"]:
        if row["network"] == "vae_decoder" and row["checkpoint"] == "5b-wide":
            shape = Shape.parse(row["shape"])
            larger = Shape(shape.frames, 2 * shape.height, shape.width)
            wrong = cpu_peak(architecture(row["checkpoint"]), larger, row["batch"])["vae_decoder"]
            assert wrong != pytest.approx(row["peak"], rel=PLANNED_MEMORY)


ALLOCATORS = 4 << 20
"""Bytes that allocators may keep free for each other: much, beside the few MB of a tiny network."""


def peak_here(bundle: Bundle, network: str, batch: int) -> int:
    words = [sys.executable, str(SCRIPT), "--session", str(bundle.path), network, str(batch)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


@pytest.mark.parametrize("network", ["text_encoder", "transformer", "vae_decoder"])
def test_sessions_of_this_machine_take_what_is_predicted(network: NetworkName, tiny: Tiny, exported: Exported) -> None:
    bundle = exported("5b")
    batch = 2 if network == "transformer" else 1
    expected = cpu_peak(read(tiny("5b")), bundle.shape, batch)[network]
    assert expected == pytest.approx(peak_here(bundle, network, batch), rel=PLANNED_MEMORY, abs=ALLOCATORS)


def test_the_miniature_takes_what_is_predicted() -> None:
    bundle = Bundle.open(miniature("mini"))
    expected = cpu_peak(read(Path(bundle.path)), bundle.shape, 2)["transformer"]
    assert expected == pytest.approx(peak_here(bundle, "transformer", 2), rel=PLANNED_MEMORY, abs=ALLOCATORS)


def test_a_video_of_one_chunk_has_no_state() -> None:
    known = Architecture.of_model(MODELS["5b"])
    assert gpu_needs(known, Shape(9, 480, 720), "bf16", "bf16", 2)["vae_decoder"].state == 0
    assert gpu_needs(known, Shape(17, 480, 720), "bf16", "bf16", 2)["vae_decoder"].state > 0


def test_tiles_need_a_quarter_of_the_state() -> None:
    known, shape = Architecture.of_model(MODELS["5b"]), Shape(49, 480, 720)
    whole, tile = (gpu_needs(known, at, "fp16", "fp16", 2)["vae_decoder"].state for at in (shape, tiled(shape)))
    assert whole == 4 * tile
    assert whole == 2 * 2_809_382_400  # one set of 2.8 GB at 480x720 in fp16 is read, one is written
