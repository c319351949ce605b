"""The parity ladder: it holds for every model, and names the place where a bundle is wrong."""

import shutil
from dataclasses import replace
from pathlib import Path

import onnx

from cvx_deploy.bundle import MANIFEST, Bundle
from cvx_deploy.exporters.checkpoint import Checkpoint
from cvx_deploy.exporters.synth import synthesize
from cvx_deploy.files import sha256_of
from cvx_deploy.progress import SilentProgress
from cvx_deploy.report.check import CheckRequest, check
from cvx_deploy.report.ladder import Parity
from tests.conftest import Exported, Tiny
from tests.parity.corrupt import corrupted

WHOLE = ("5b", "1.5-5b-i2v")
"""Models whose whole videos are compared, too, and whose graphs are traced once more without rewrites."""


def climbed(bundle: Bundle, checkpoint: Path, straight: Bundle, **request: object) -> Parity:
    """Check a bundle in as few steps as will do; by default its networks alone."""
    asked = CheckRequest(straight=straight, **{"level": "networks", "steps": 1, **request})  # type: ignore[arg-type]
    return check(bundle, Checkpoint(checkpoint), asked, SilentProgress())


def failing(found: Parity) -> tuple[str, set[str]]:
    """Return the first rung that fails, and the networks that fail on it."""
    rung = found.first_failing
    assert rung is not None, str(found)
    return rung.name, {result.network for result in rung.networks if result.broken}


def test_every_model_passes(model_name: str, tiny: Tiny, exported: Exported) -> None:
    whole = model_name in WHOLE
    straight = exported(model_name, rewrites=()) if whole else exported(model_name)
    more = {"level": "video", "steps": 2} if whole else {}
    found = climbed(exported(model_name), tiny(model_name), straight, **more)
    assert found.error is None, str(found)
    compared = {rung.name: len(rung.results) for rung in found.rungs if not rung.skipped}
    assert list(compared) == ["eager", "own-type", "onnx", "rewritten", "engine"]
    assert compared["onnx"] == compared["rewritten"] >= 7
    if whole:
        assert compared["engine"] == 2
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


def with_swapped_input(bundle: Bundle, folder: Path) -> Bundle:
    """Return a copy whose first attention takes queries as keys and keys as queries, hashes made to agree."""
    shutil.copytree(bundle.path, folder)
    path = folder / "transformer.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    node.input[0], node.input[1] = node.input[1], node.input[0]
    path.write_bytes(model.SerializeToString())
    network = bundle.network("transformer")
    file = replace(network.file, size=path.stat().st_size, sha256=sha256_of(path))
    networks = {**bundle.manifest.networks, "transformer": replace(network, file=file)}
    (folder / MANIFEST).write_bytes(replace(bundle.manifest, networks=networks).to_json())
    return Bundle.open(folder)


def test_a_swapped_input_fails_at_its_node(tiny: Tiny, exported: Exported, tmp_path: Path) -> None:
    found = climbed(with_swapped_input(exported("5b"), tmp_path / "b"), tiny("5b"), exported("5b", rewrites=()))
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
