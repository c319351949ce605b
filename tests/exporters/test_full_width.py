"""A checkpoint of the published width and little depth: what the tiny ones are too narrow to show."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from diffusers import CogVideoXTransformer3DModel
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.exporters.sources.synth import synthesize
from cvx_deploy.shape import Shape
from tests.parity.test_networks import (
    Arrays,
    eager_noise,
    eager_transformer,
    exported_noise,
    relative_error,
    transformer_inputs,
)
from tests.tolerances import NETWORK_RELATIVE
from tests.untraced import without_tracing

pytestmark = pytest.mark.nightly

# The 2.03 GB of the checkpoint, and some air.
ROOM = 3 * 10**9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("wide")
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        pytest.skip(f"a checkpoint of full width needs {ROOM:,} bytes of disk: {free:,} are free in {folder}")
    try:
        yield synthesize("5b", "wide", folder / "5b")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    request = ExportRequest("5b", checkpoint, shapes=(Shape(9, 64, 64),))
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_tracing(monkeypatch, "vae")  # as deep as ever, so most of the time goes there
        return bundle_from_checkpoint(request, tmp_path_factory.mktemp("bundle") / "5b")


@pytest.fixture(scope="module")
def inputs(bundle: Bundle) -> Arrays:
    return transformer_inputs(bundle, batch=2)


@pytest.fixture(scope="module")
def noise(bundle: Bundle, inputs: Arrays) -> NDArray[np.float32]:
    return exported_noise(bundle, inputs, batch=2, threads=1)  # two lose time where tests run side by side


@pytest.fixture(scope="module")
def eager(checkpoint: Path, noise: NDArray[np.float32]) -> CogVideoXTransformer3DModel:
    # After the other's: two sets of weights in float32 are never there at once.
    return eager_transformer(checkpoint)


def test_no_weight_is_copied_into_the_bundle(bundle: Bundle, checkpoint: Path) -> None:
    manifest = bundle.manifest
    assert manifest.checkpoint == str(checkpoint)
    assert not any(file.in_bundle for file in manifest.weights.values())
    assert sum(file.size for file in manifest.weights.values()) > 2 * 10**9
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) < 20 * 10**6


def test_transformer_of_full_width_matches_diffusers(
    bundle: Bundle, checkpoint: Path, eager: CogVideoXTransformer3DModel, inputs: Arrays, noise: NDArray[np.float32]
) -> None:
    assert (eager.proj_out.in_features, len(eager.transformer_blocks)) == (3072, 2)
    assert relative_error(noise, eager_noise(eager, checkpoint, bundle.shape, inputs)) < NETWORK_RELATIVE


def test_another_weight_of_full_width_is_seen(
    bundle: Bundle,
    checkpoint: Path,
    eager: CogVideoXTransformer3DModel,
    inputs: Arrays,
    noise: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = eager.transformer_blocks[1].attn1.to_k.weight
    monkeypatch.setattr(weight, "data", weight.data.flip(0, 1))
    assert relative_error(noise, eager_noise(eager, checkpoint, bundle.shape, inputs)) > NETWORK_RELATIVE
