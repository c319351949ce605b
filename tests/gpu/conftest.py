"""What the tests on a device share: a library that is installed, the driver, and bundles with their engines."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.cuda import Cuda, CudaPython
from cvx_deploy.engines.tensorrt.backend import TensorRtBackend
from cvx_deploy.engines.tensorrt.build import BuildRequest, build
from cvx_deploy.engines.tensorrt.compile import BuildSettings
from cvx_deploy.engines.tensorrt.libraries import ENGINE_KINDS, Library, load_library
from cvx_deploy.engines.tensorrt.platforms import platform_here
from cvx_deploy.engines.tensorrt.store import EngineStore
from cvx_deploy.errors import EngineError
from cvx_deploy.progress import SilentProgress
from tests.conftest import Exported

Built = Callable[..., Bundle]
Opened = Callable[..., TensorRtBackend]


@pytest.fixture(scope="session")
def cuda() -> Cuda:
    """Return this machine's driver; without one, or without a GPU, the test is skipped and says why."""
    try:
        return CudaPython()
    except EngineError as error:
        pytest.skip(f"needs a CUDA device: {error.what}")


@pytest.fixture(scope="session", params=ENGINE_KINDS)
def library(request: pytest.FixtureRequest, cuda: Cuda) -> Library:
    """Return each TensorRT library that is installed here."""
    try:
        return load_library(request.param)
    except EngineError as error:
        pytest.skip(f"needs the library: {error.what}")


@pytest.fixture(scope="session")
def built(library: Library, exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Return a function that gives a tiny bundle with engines for the GPU of this machine."""
    made: dict[str, Bundle] = {}

    def bundle(name: str, *, weight_streaming: bool = False, **request: Any) -> Bundle:
        key = f"{name} {weight_streaming} {request}"
        if key not in made:
            path = tmp_path_factory.mktemp("bundle") / name
            shutil.copytree(exported(name, **request).path, path)
            settings = BuildSettings(weight_streaming=weight_streaming)
            wanted = BuildRequest(platform=platform_here(), settings=settings)
            made[key] = Bundle.open(path)
            list(build(library, made[key], wanted, SilentProgress()))
        return made[key]

    return bundle


@pytest.fixture
def opened(library: Library, cuda: Cuda) -> Iterator[Opened]:
    """Return a function that opens a bundle on the GPU; all are closed after the test, and must give all back."""
    backends: list[TensorRtBackend] = []
    free, _ = cuda.memory_info()

    def backend(bundle: Bundle, **options: Any) -> TensorRtBackend:
        backends.append(TensorRtBackend(bundle, library, cuda, EngineStore(bundle), **options))
        return backends[-1]

    yield backend
    for each in backends:
        each.close()
    left, _ = cuda.memory_info()
    assert free - left < 512 * 2**20, "what a library keeps for itself (kernels, handles) is less than that"
