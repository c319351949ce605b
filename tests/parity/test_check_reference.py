"""What a check is held against where a bundle has adapters, and what it tells where no engine here runs the bundle."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.exporters.quantization.quantized import Quantizing
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.parity.check import CheckRequest, check
from cvx_deploy.parity.ladder import Parity
from cvx_deploy.progress import SilentProgress
from tests.command import cvx
from tests.conftest import Exported, Quantized, Tiny
from tests.exporters.sources.test_lora import ATTENTION, matrices, written
from tests.parity.test_check import climbed, failing, on_disk, with_graph


@pytest.fixture(scope="module")
def adapted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with an adapter merged into it, and the adapter beside it."""
    folder = tmp_path_factory.mktemp("lora")
    lora = written(folder / "style.safetensors", matrices(tiny("5b"), ATTENTION, 4, 1))
    return bundle_from_checkpoint(ExportRequest("5b", tiny("5b"), loras=((lora, 0.6),)), folder / "bundle")


def of_checkpoint(bundle: Bundle, **request: Any) -> Parity:
    """Check a bundle with all that the check makes for itself."""
    asked = CheckRequest(level="networks", steps=1, **request)
    return check(bundle, Checkpoint(Path(bundle.manifest.checkpoint)), asked, SilentProgress())


def test_adapters_are_merged_into_what_a_bundle_is_held_against(adapted: Bundle) -> None:
    found = of_checkpoint(adapted)
    assert found.error is None, str(found)


def test_a_bundle_of_another_scale_than_it_says_fails(adapted: Bundle) -> None:
    [lora] = adapted.manifest.loras
    other = replace(adapted.manifest, loras=(replace(lora, scale=0.5),))
    assert_adapter_is_seen(of_checkpoint(replace(adapted, manifest=other)))


def test_a_bundle_with_an_adapter_that_it_does_not_tell_of_fails(
    adapted: Bundle, tiny: Tiny, exported: Exported
) -> None:
    silent = replace(adapted, manifest=replace(adapted.manifest, loras=()))
    assert_adapter_is_seen(climbed(silent, tiny("5b"), exported("5b", rewrites=())))


def assert_adapter_is_seen(found: Parity) -> None:
    assert failing(found) == ("rewritten", {"transformer"})
    assert "transformer_blocks.0.attn1.to_" in found.divergence[0].layers[0].name


@pytest.mark.parametrize("change", ["is not there", "was altered since"])
def test_an_adapter_that_is_another_now_is_refused(change: str, adapted: Bundle, tmp_path: Path) -> None:
    [lora] = adapted.manifest.loras
    path = tmp_path / "style.safetensors"
    if change == "was altered since":
        path.write_bytes(Path(lora.path).read_bytes() + b" ")
    manifest = replace(adapted.manifest, loras=(replace(lora, path=str(path)),))
    place = on_disk(replace(adapted, manifest=manifest), tmp_path / "bundle")
    failed = cvx("check", "--bundle", place).failure()
    assert f"the LoRA {path} was merged into {place}, and {change}" in failed
    assert lora.sha256 in failed


def test_another_models_checkpoint_is_refused(tiny: Tiny, exported: Exported) -> None:
    failed = cvx("check", "--bundle", exported("5b").path, "--checkpoint", tiny("2b")).failure()
    assert "is of another model" in failed


@pytest.fixture(scope="module")
def fp8(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle in fp8 that computes all else in bf16, what an export for a GPU is by default."""
    folder = tmp_path_factory.mktemp("fp8")
    few = ("quantize", "--model", "5b", "--checkpoint", tiny("5b"), "--num-prompts", 1)
    assert cvx(*few, "--steps", 2, "--output", folder / "table.safetensors").code == 0
    how = Quantizing(folder / "table.safetensors")
    request = ExportRequest("5b", tiny("5b"), precision="fp8", quantizing=how)
    return bundle_from_checkpoint(request, folder / "bundle")


@pytest.fixture
def unquantized(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the exports that a check of it makes be those that are there already."""

    def ready(_: object, __: object, ___: str, rewrites: tuple[str, ...] | None) -> Bundle:
        every = {} if rewrites is None else {"rewrites": rewrites}
        return exported("5b", precision="bf16", **every)

    monkeypatch.setattr("cvx_deploy.parity.check._Climb._export", ready)


def test_fp8_passes_on_a_cpu_by_reference_and_says_what_was_skipped(
    fp8: Bundle, unquantized: None, tmp_path: Path
) -> None:
    done = cvx("check", "--bundle", fp8.path, "--steps", 1, "--output", tmp_path)
    assert done.code == 0, done
    assert "skipped  engine: no engine for a CPU runs fp8 fast" in done.out
    assert "every rung that was tried holds. Skipped: the rung engine" in done.out
    told = json.loads((tmp_path / "check.json").read_text())
    assert told["passed"]
    assert "no engine for a CPU runs fp8 fast" in told["skipped"]["engine"]
    quantized = next(rung for rung in told["rungs"] if rung["name"] == "quantized")
    assert "as a reference: fp8 and bf16 computed in float32" in quantized["runs_on"]
    assert quantized["trajectories"]
    assert quantized["videos"]
    page, tests = (tmp_path / "check.md").read_text(), (tmp_path / "junit.xml").read_text()
    assert "Every rung that was tried holds. Skipped: the rung engine" in page
    assert "no engine for a CPU runs fp8 fast" in tests
    assert (tmp_path / "contact.png").exists()


def test_wrong_scales_of_fp8_fail_by_reference_and_an_engine_that_cannot_fails(
    fp8: Bundle, unquantized: None, tmp_path: Path
) -> None:
    wrong = with_graph(fp8, tmp_path / "wrong", double_activations)
    found = of_checkpoint(wrong, engine="onnxruntime")
    assert failing(found) == ("quantized", {"transformer"})
    engine = next(rung for rung in found.rungs if rung.name == "engine")
    assert engine.failures
    assert all("fp8, which no CPU can" in result.broken[0] for result in engine.failures)


@pytest.mark.parametrize(
    "precision",
    ["int8/fp32", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("int8wo/fp32", "int4wo/fp32"))],
)
def test_what_a_cpu_multiplies_in_few_bits_passes_at_every_level(
    precision: str, quantized: Quantized, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ready(_: object, __: object, ___: str, rewrites: tuple[str, ...] | None) -> Bundle:
        every: dict[str, Any] = {} if rewrites is None else {"rewrites": rewrites}
        return exported("5b", frames=9, **every)

    monkeypatch.setattr("cvx_deploy.parity.check._Climb._export", ready)
    bundle = quantized(precision)
    found = check(bundle, Checkpoint(Path(bundle.manifest.checkpoint)), CheckRequest(steps=1), SilentProgress())
    assert found.error is None, str(found)
    quantized_rung, engine = (
        next(rung for rung in found.rungs if rung.name == name) for name in ("quantized", "engine")
    )
    assert quantized_rung.networks
    assert engine.trajectories
    assert [video.shape.partition(", ")[2] for video in engine.videos] == ["", "from a video"]


def double_activations(graph: onnx.GraphProto) -> None:
    """Let quantized activations be read back by another scale than they were rounded by."""
    for node in list(graph.node):
        if node.op_type == "DequantizeLinear" and "/Weight" not in node.name:
            name, node.output[0] = node.output[0], f"{node.output[0]} halved"
            double = onnx.helper.make_node("Add", [node.output[0]] * 2, [name])
            graph.node.insert(list(graph.node).index(node) + 1, double)
