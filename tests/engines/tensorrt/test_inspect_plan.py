"""`inspect --plan` shows what a bundle's engines were compiled to, from the record that a build leaves in it."""

import json
import os
from pathlib import Path

import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.tensorrt.store import EngineKey, EngineStore, WrittenEngine
from cvx_deploy.files import sha256_of
from cvx_deploy.measure.memory import MemoryWatch
from tests.bundle.test_bundle import make_bundle
from tests.command import cvx
from tests.engines.tensorrt.compiled import compiled


@pytest.fixture
def built(tmp_path: Path) -> Bundle:
    """A bundle with an engine in it, whose plan is that of two blocks compiled for sm89."""
    bundle = make_bundle(tmp_path)
    store = EngineStore(bundle)
    wanted = store.wanted("vae", "1.7.1", None)
    key = EngineKey("tensorrt-rtx", wanted.graph, wanted.weights, {}, {}, "1.7.1", ("sm89",))
    store.folder.mkdir()
    engine = store.place(key, "vae")
    engine.write_bytes(b"compiled")
    with MemoryWatch(os.getpid(), 0.01) as memory:
        written = WrittenEngine(engine.stat().st_size, sha256_of(engine), "fused", 83.0, memory)
    store.enter(key, "vae", written, (compiled(),))
    return bundle


def test_every_block_is_shown_with_its_least_time_on_a_gpu(built: Bundle) -> None:
    done = cvx("inspect", "--bundle", built.path, "--plan", "--gpu", "rtx4090")
    assert done.code == 0, done
    assert done.out.startswith("vae (engines/vae-")
    rows = [line.split()[0] for line in done.out.splitlines() if line.startswith(("transformer_blocks", "all "))]
    assert rows == ["transformer_blocks.0", "transformer_blocks.1", "all"]
    assert "an estimate from below, at RTX 4090's peaks and bandwidth" in done.out
    assert "estimate" not in cvx("inspect", "--bundle", built.path, "--plan").out


def test_json_has_the_same_figures(built: Bundle) -> None:
    told = json.loads(cvx("inspect", "--bundle", built.path, "--plan", "--gpu", "rtx4090", "--json").out)
    [plan] = told["plans"]
    assert told["bundle"] == str(built.path)
    assert plan["network"] == "vae"
    assert (built.path / plan["file"]).is_file()
    assert len(plan["blocks"]) >= 2
    assert plan["roofline"]["seconds"] == pytest.approx(sum(block["seconds"] for block in plan["blocks"]))


def test_an_altered_plan_is_refused(built: Bundle) -> None:
    [plan] = (built.path / "engines").glob("*.plan.json")
    plan.write_bytes(plan.read_bytes().replace(b"gemm", b"gamm", 1))
    assert "was altered" in cvx("inspect", "--bundle", built.path, "--plan").failure()


def test_a_bundle_without_engines_and_a_gpu_without_a_plan_are_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    failed = cvx("inspect", "--bundle", bundle.path, "--plan").failure()
    assert f"{bundle.path} has no compiled engines" in failed
    assert cvx("inspect", "--bundle", bundle.path, "--gpu", "rtx4090").code == 2
