"""TensorRT on a GPU against ONNX Runtime on the CPU: every network, and whole videos, in every way to run them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.backend import Backend
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.engines.tensorrt.backend import TensorRtBackend
from cvx_deploy.pipeline import vae
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import run
from tests.gpu.conftest import Built, Opened
from tests.tolerances import TF32_PSNR, TF32_RELATIVE

pytestmark = pytest.mark.gpu

PROMPT = "a red circle moves to the right"
Arrays = dict[str, NDArray[Any]]


def sizes_of(bundle: Bundle, batch: int) -> dict[str, int]:
    spatial = bundle.manifest.vae.spatial
    height, width = bundle.shape.height // spatial, bundle.shape.width // spatial
    return {"batch": batch, "latent_height": height, "latent_width": width}


def inputs_of(bundle: Bundle, role: str, batch: int) -> Arrays:
    rng, sizes = np.random.default_rng(1), sizes_of(bundle, batch)
    inputs: Arrays = {}
    for spec in bundle.network(role).inputs:
        shape = spec.resolve(sizes)
        integers = spec.dtype == "int64"
        values = rng.integers(1, 30, shape) if integers else rng.standard_normal(shape)
        inputs[spec.name] = values.astype(spec.dtype)
    return inputs


def outputs_of(backend: Backend, role: str, inputs: Arrays, batch: int) -> Arrays:
    with backend.load(role, sizes_of(backend.bundle, batch)) as session:
        return {name: backend.to_host(tensor) for name, tensor in session.run(inputs).items()}


def video(backend: Backend, folder: Path, **request: Any) -> NDArray[np.float32]:
    run(backend, RunRequest(output=folder / "out.npy", **{"prompts": (PROMPT,), "steps": 4, **request}))
    return np.load(folder / "out.npy")


def assert_alike(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert expected.std() > 0.02, "a flat video would agree with anything"
    assert -10 * np.log10(np.mean((found - expected) ** 2) + 1e-20) > TF32_PSNR


def test_every_network_agrees_with_onnx_runtime(model_name: str, built: Built, opened: Opened) -> None:
    bundle = built(model_name)
    backend = opened(bundle)
    for role in bundle.manifest.shapes[0].networks:
        for batch in (1, 2) if role == "transformer" else (1,):
            inputs = inputs_of(bundle, role, batch)
            expected, found = outputs_of(OrtBackend(bundle), role, inputs, batch), {}
            for _ in range(3):  # plain, captured, launched again
                found = outputs_of(backend, role, inputs, batch)
            for name, values in expected.items():
                error = np.abs(found[name] - values).max() / np.abs(values).max()
                assert error < TF32_RELATIVE, f"{role} {name}"


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["2b", "1.5-5b"])
def test_whole_videos_agree_with_onnx_runtime(
    name: str, graphs: bool, built: Built, opened: Opened, tmp_path: Path
) -> None:
    bundle = built(name)
    expected = video(OrtBackend(bundle), tmp_path, num_videos=2)
    assert_alike(video(opened(bundle, cuda_graphs=graphs), tmp_path, num_videos=2), expected)


def test_both_decoders_agree_through_every_chunk(built: Built, opened: Opened) -> None:
    bundle = built("1.5-5b")
    sizes = sizes_of(bundle, 1)
    shape = (1, bundle.manifest.vae.latent_channels, 13, sizes["latent_height"], sizes["latent_width"])
    latents = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    backend = opened(bundle)
    expected, *found = (
        np.concatenate(list(vae.decode(each, latents, tiled=False, advance=lambda _: None)), axis=2)
        for each in (OrtBackend(bundle), backend, backend)
    )
    for pixels in found:
        assert np.abs(pixels - expected).max() / np.abs(expected).max() < TF32_RELATIVE


def test_graphs_change_nothing(built: Built, opened: Opened, tmp_path: Path) -> None:
    bundle = built("2b")
    plain, graphs = (video(opened(bundle, cuda_graphs=each), tmp_path) for each in (False, True))
    assert np.array_equal(plain, graphs)


def peak(backend: TensorRtBackend) -> int:
    """Return the most device memory that in- and outputs and activations took at once; weights are the library's."""
    return backend._memory.peak


def test_phases_make_room_for_one_another_and_change_nothing(built: Built, opened: Opened, tmp_path: Path) -> None:
    bundle = built("2b")
    free, phased = opened(bundle), opened(bundle, vram=2**30)
    assert np.array_equal(video(free, tmp_path), video(phased, tmp_path))
    assert peak(phased) < peak(free)


def test_streamed_weights_change_nothing(built: Built, opened: Opened, tmp_path: Path) -> None:
    bundle = built("2b", weight_streaming=True)
    resident = opened(bundle)
    expected = video(resident, tmp_path)
    tight = opened(bundle, vram=peak(resident) + 2**20)
    assert np.array_equal(video(tight, tmp_path), expected)


def test_twin_another_seed_is_not_alike(built: Built, opened: Opened, tmp_path: Path) -> None:
    bundle = built("2b")
    expected = video(OrtBackend(bundle), tmp_path)
    with pytest.raises(AssertionError):
        assert_alike(video(opened(bundle), tmp_path, seed=1), expected)
