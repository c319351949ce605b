"""The parity ladder: it holds for every model, and names the place where a bundle is wrong."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest

from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.engines.backend import Backend
from cvx_deploy.engines.registry import open_backend
from cvx_deploy.engines.spec import EngineName
from cvx_deploy.exporters.cogvideox import networks
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.sources.synth import synthesize
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.files import sha256_of
from cvx_deploy.parity.check import CheckRequest, check
from cvx_deploy.parity.ladder import Parity
from cvx_deploy.progress import SilentProgress
from tests.command import cvx
from tests.conftest import Exported, Tiny
from tests.parity.corrupt import corrupted
from tests.parity.test_pipelines import TWO_SHAPES, with_ratio

WHOLE = ("5b", "1.5-5b-i2v")
"""Models whose whole videos are compared, too, and whose graphs are traced once more without rewrites."""


def climbed(bundle: Bundle, checkpoint: Path, straight: Bundle, **request: object) -> Parity:
    """Check a bundle in as few steps as will do; by default its networks alone.

    What a check exports of the checkpoint without rewrites is `straight`, which is there already.
    """
    options = {"engine": "onnxruntime", "level": "networks", "steps": 1, **request}
    with mock.patch("cvx_deploy.exporters.export.bundle_from_checkpoint", return_value=straight) as exports:
        found = check(bundle, Checkpoint(checkpoint), CheckRequest(**options), SilentProgress())  # type: ignore[arg-type]
    exports.assert_called_once()
    assert exports.call_args.args[0].rewrites == ()
    return found


def failing(found: Parity) -> tuple[str, set[str]]:
    """Return the first rung that fails, and the networks that fail on it."""
    rung = found.first_failing
    assert rung is not None, str(found)
    return rung.name, {result.network for result in rung.networks if result.broken}


@pytest.mark.parametrize(
    "name",
    [
        *WHOLE,
        *(
            pytest.param(model, marks=pytest.mark.nightly) for model in MODELS if model not in WHOLE
        ),  # see test_networks
    ],
)
def test_every_model_passes(name: str, tiny: Tiny, exported: Exported) -> None:
    whole = name in WHOLE
    straight = exported(name, rewrites=()) if whole else exported(name)
    more = {"level": "video", "steps": 2} if whole else {}
    found = climbed(exported(name), tiny(name), straight, **more)
    assert found.error is None, str(found)
    compared = {rung.name: len(rung.results) for rung in found.rungs if not rung.skipped}
    assert list(compared) == ["eager", "own-type", "onnx", "rewritten", "engine"]
    assert compared["onnx"] == compared["rewritten"] >= 7
    if whole:
        remade = ["from a video"] * (name == "5b")
        engine = next(rung for rung in found.rungs if rung.name == "engine")
        for made in (engine.trajectories, engine.videos):
            assert [one.shape.partition(", ")[2] for one in made] == ["", *remade]
        [video] = next(rung for rung in found.rungs if rung.name == "own-type").videos
        assert video.difference is not None
        assert video.difference.psnr < 100, "half precision is not float32"


def test_a_corrupted_weight_fails_at_its_layer(tiny: Tiny, exported: Exported, tmp_path: Path) -> None:
    broken = corrupted(exported("5b"), "transformer", "transformer_blocks.1.attn1.to_k.weight", tmp_path)
    found = climbed(broken, tiny("5b"), exported("5b", rewrites=()))
    assert failing(found) == ("rewritten", {"transformer"})
    [divergence] = found.divergence
    assert "transformer_blocks.1.attn1.to_k/" in divergence.layers[0].name
    assert divergence.layers[0].name in str(found.error)


def with_graph(bundle: Bundle, folder: Path, change: Callable[[onnx.GraphProto], None]) -> Bundle:
    """Return a copy whose transformer has a changed graph, hashes made to agree."""
    shutil.copytree(bundle.path, folder)
    name, network = bundle.network_name("transformer"), bundle.network("transformer")
    path = folder / network.file.path
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    file = replace(network.file, size=path.stat().st_size, sha256=sha256_of(path))
    networks = {**bundle.manifest.networks, name: replace(network, file=file)}
    (folder / MANIFEST).write_bytes(replace(bundle.manifest, networks=networks).to_json())
    return Bundle.open(folder)


def swap_inputs(graph: onnx.GraphProto) -> None:
    """Let the first attention take queries as keys and keys as queries."""
    node = next(node for node in graph.node if node.op_type == "Attention")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def test_a_swapped_input_fails_at_its_node(tiny: Tiny, exported: Exported, tmp_path: Path) -> None:
    found = climbed(with_graph(exported("5b"), tmp_path / "b", swap_inputs), tiny("5b"), exported("5b", rewrites=()))
    assert failing(found) == ("rewritten", {"transformer"})
    [divergence] = found.divergence
    assert "transformer_blocks.0.attn1/Attention" in divergence.layers[0].name


def with_other_text_encoder(bundle: Bundle, folder: Path) -> Bundle:
    """Return a bundle over a copy of its checkpoint with another text encoder, as an old export would have it."""
    shutil.copytree(bundle.manifest.checkpoint, folder / "old")
    (folder / "old" / "SHA256SUMS").unlink()
    shutil.rmtree(folder / "old" / "text_encoder")
    synthesize(bundle.manifest.model, "tiny", folder / "other", seed=1)
    shutil.copytree(folder / "other" / "text_encoder", folder / "old" / "text_encoder")
    old = Checkpoint(folder / "old")
    weights = {name: old.weight_file(entry.path) for name, entry in bundle.manifest.weights.items()}
    return replace(bundle, manifest=replace(bundle.manifest, checkpoint=str(old.root), weights=weights))


def test_a_stale_text_encoder_fails_in_the_text_encoder(tiny: Tiny, exported: Exported, tmp_path: Path) -> None:
    stale = with_other_text_encoder(exported("5b"), tmp_path)
    found = climbed(stale, tiny("5b"), exported("5b", rewrites=()), level="trajectory")
    assert failing(found) == ("rewritten", {"text_encoder"})
    assert [one.network for one in found.divergence] == ["text_encoder"]
    engine = next(rung for rung in found.rungs if rung.name == "engine")
    assert engine.failures, "another text encoder makes other latents"
    assert "text_encoder" in found.error.what if found.error else False


def on_disk(bundle: Bundle, folder: Path) -> Path:
    """Return the folder of a bundle that has a manifest of its own; graphs are those of the bundle it was made from."""
    shutil.copytree(bundle.path, folder)
    (folder / MANIFEST).write_bytes(bundle.manifest.to_json())
    return folder


def test_the_command_names_the_layer_of_a_corrupted_weight(tiny: Tiny, exported: Exported, tmp_path: Path) -> None:
    layer = "transformer_blocks.0.ff.net.2"
    broken = on_disk(corrupted(exported("5b"), "transformer", f"{layer}.weight", tmp_path), tmp_path / "bundle")
    words = ("check", "--bundle", broken, "--checkpoint", tiny("5b"), "--level", "networks", "--steps", 1)
    done = cvx(*words, "--output", tmp_path / "report")
    assert "fails at the rung rewritten" in done.failure()
    assert f"transformer first differs at model.{layer}/" in done.failure()
    assert f"transformer first differs at model.{layer}/" in done.out
    for form in ("check.json", "check.md", "junit.xml"):
        assert "rewritten" in (tmp_path / "report" / form).read_text()
    assert f"model.{layer}/" in (tmp_path / "report" / "check.json").read_text()


@pytest.mark.parametrize("role", ["text_encoder", "transformer"])
def test_a_wrong_trace_is_named_by_the_module_that_differs(
    role: str, tiny: Tiny, exported: Exported, tmp_path: Path
) -> None:
    tensor = {"text_encoder": "encoder.block.1.layer.1.DenseReluDense.wo", "transformer": WRONG}[role]
    wrong = corrupted(exported("5b", rewrites=()), role, f"{tensor}.weight", tmp_path)
    found = climbed(exported("5b"), tiny("5b"), wrong)
    assert failing(found) == ("onnx", {role})
    [divergence] = found.divergence
    assert tensor in divergence.layers[0].name


WRONG = "transformer_blocks.1.ff.net.0.proj"


def test_what_an_engine_does_otherwise_is_named_by_node(
    tiny: Tiny, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = corrupted(exported("5b"), "transformer", f"{WRONG}.weight", tmp_path).manifest

    def open_wrong(engine: EngineName, bundle: Bundle, **options: Any) -> AbstractContextManager[Backend]:
        view = replace(bundle, manifest=wrong) if engine == "openvino" else bundle
        return open_backend(engine, view, **options)

    monkeypatch.setattr("cvx_deploy.parity.check.open_backend", open_wrong)
    found = climbed(exported("5b"), tiny("5b"), exported("5b", rewrites=()), engine="openvino")
    assert failing(found) == ("engine", {"transformer"})
    [divergence] = found.divergence
    assert f"{WRONG}/" in divergence.layers[0].name


@pytest.mark.nightly
def test_sizes_of_a_bundle_pass_and_the_one_that_is_wrong_is_named(
    tiny: Tiny, exported: Exported, tmp_path: Path
) -> None:
    name, shapes = TWO_SHAPES[0]
    bundle, straight = exported(name, shapes=shapes), exported(name, shapes=shapes, rewrites=())
    found = climbed(bundle, tiny(name), straight, level="trajectory")
    assert found.error is None, str(found)
    engine = next(rung for rung in found.rungs if rung.name == "engine")
    assert [one.shape for one in engine.trajectories if "from a video" not in one.shape] == [*map(str, shapes)]
    second = bundle.at(shapes[1])
    wrong = climbed(with_graph(second, tmp_path / "wrong", swap_inputs), tiny(name), straight)
    assert failing(wrong) == ("rewritten", {second.network_name("transformer")} - {bundle.network_name("transformer")})
    assert [one.shape for one in wrong.divergence] == [str(shapes[1])]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [pytest.param(8, marks=pytest.mark.nightly), 16])  # 8 is right: test_pipelines
def test_an_encoder_cut_into_other_chunks_than_diffusers_fails_in_a_video_made_from_one(
    chunk: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_ratio(tiny("2b"), tmp_path / "checkpoint", 8)
    monkeypatch.setattr(networks, "ENCODER_CHUNK", chunk)
    request = ExportRequest("mine", folder, frames=17, height=48, width=48)
    bundle = bundle_from_checkpoint(request, tmp_path / "bundle")
    found = climbed(bundle, folder, bundle, level="trajectory", steps=2)
    [engine] = [rung for rung in found.rungs if rung.name == "engine"]
    broken = [result.subject for result in engine.failures]
    assert broken == ([] if chunk == 8 else ["latents at 17x48x48, from a video"])
