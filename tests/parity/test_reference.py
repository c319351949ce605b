"""What a bundle is held against is found where it lies, fetched where it has to be, and never another model's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import CheckpointError, WrongModelError
from cvx_deploy.exporters.reference.checkpoint import Reference, reference_checkpoint, with_weights
from cvx_deploy.miniatures import miniature
from cvx_deploy.progress import SilentProgress
from tests.command import cvx
from tests.conftest import Exported, Tiny
from tests.exporters.sources.stub_hub import StubHub
from tests.exporters.sources.test_hub import ID, VAE, hub  # noqa: F401
from tests.parity.corrupt import corrupted
from tests.parity.test_check import on_disk


def held_against(bundle: Bundle, reference: Reference) -> Path:
    return reference_checkpoint(bundle, reference, SilentProgress()).root


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_hubs_checkpoint_is_fetched_once(revision: str | None, hub: StubHub, exported: Exported) -> None:  # noqa: F811
    found = held_against(exported("5b"), Reference(ID, revision))
    assert (found / VAE).read_bytes() == (hub.root / VAE).read_bytes()
    hub.requests.clear()
    assert held_against(exported("5b"), Reference(ID, revision, offline=True)) == found
    assert hub.requests == []


def test_another_model_is_refused_before_its_weights_are_fetched(hub: StubHub, exported: Exported) -> None:  # noqa: F811
    with pytest.raises(WrongModelError, match=r"is of another model than .*, a 2b"):
        held_against(exported("2b"), Reference(ID))
    assert not [file for file in hub.served() if file.endswith(".safetensors")]


def test_what_is_gone_is_named_as_it_was_fetched(exported: Exported, tmp_path: Path) -> None:
    provenance = {"source": ID, "revision": "0123abc"}
    manifest = replace(exported("5b").manifest, checkpoint=str(tmp_path / "gone"), provenance=provenance)
    with pytest.raises(CheckpointError, match="is not there") as raised:
        held_against(replace(exported("5b"), manifest=manifest), Reference())
    assert raised.value.fix == f"name it with --checkpoint {ID} --revision 0123abc"


def test_weights_come_from_the_checkpoint_only_where_they_are_gone(
    tiny: Tiny, exported: Exported, tmp_path: Path
) -> None:
    bundle = exported("5b")
    assert with_weights(bundle, tmp_path) == bundle
    gone = replace(bundle, manifest=replace(bundle.manifest, checkpoint=str(tmp_path / "gone")))
    assert Path(with_weights(gone, tiny("5b")).manifest.checkpoint) == tiny("5b")


def test_a_folder_has_no_revision(tiny: Tiny, exported: Exported) -> None:
    with pytest.raises(CheckpointError, match="has no revision v1"):
        held_against(exported("5b"), Reference(str(tiny("5b")), "v1"))


def test_check_takes_a_hubs_checkpoint(
    hub: StubHub,  # noqa: F811
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cvx_deploy.parity.check._Climb._export", lambda *_, **__: exported("5b", rewrites=()))
    broken = on_disk(corrupted(exported("5b"), "vae", "decoder.conv_in.conv.weight", tmp_path), tmp_path / "bundle")
    words = ("check", "--bundle", broken, "--level", "networks", "--steps", 1)
    failed = cvx(*words, "--checkpoint", ID, "--revision", "v1").failure()
    assert "fails at the rung rewritten" in failed
    assert "vae_decoder_first first differs at coder.conv_in" in failed
    hub.requests.clear()
    assert "has no revision" in cvx(*words, "--checkpoint", hub.root, "--revision", "v1").failure()


@pytest.mark.nightly
def test_bench_takes_a_hubs_checkpoint(hub: StubHub, tmp_path: Path) -> None:  # noqa: F811
    hub.root, hub.repository = Path(shutil.copytree(miniature("mini"), tmp_path / "mini")), "someone/mini"
    words = ("bench", "--model", "mini", "--steps", 2, "--runs", 1, "--quiet", "--output", tmp_path / "bench", "--json")
    done = cvx(*words, "--checkpoint", "someone/mini")
    assert done.code == 0, done
    assert [peer["name"] for peer in json.loads(done.out)["peers"]] == ["eager", "onnxruntime"]
    assert "transformer/diffusion_pytorch_model.safetensors" in hub.served()
