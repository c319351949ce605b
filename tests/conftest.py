"""Tiny checkpoints and their bundles, made once and kept in ``.cache`` until the code that makes them changes."""

import fcntl
import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from cvx_deploy import __version__
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import CvxError
from cvx_deploy.exporters.tracing.sources import sources_of
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.precision import Precision
from cvx_deploy.progress import SilentProgress
from cvx_deploy.shape import Shape

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "tests"
_TOOLS = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript", "optimum", "torchao")
_SYNTH = "cvx_deploy.exporters.sources.synth"
_EXPORT = "cvx_deploy.exporters.export"
_CALIBRATE = "cvx_deploy.exporters.quantization.calibrate"

# What exports trace here is kept here, and found by every test that traces the same, in other processes too.
os.environ["CVX_CACHE_DIR"] = str(CACHE)
os.environ["CVX_ENGINE"] = "onnxruntime"  # what auto means, for the same results on every machine

Tiny = Callable[[str], Path]
Exported = Callable[..., Bundle]
Quantized = Callable[..., Bundle]


@functools.cache
def _cache(kind: str, *makers: str) -> Path:
    """Return the folder for one kind of thing that belongs to this state of the modules that make it."""
    digest = hashlib.sha256()
    for file in sources_of(*makers):
        digest.update(file.read_bytes())
    digest.update(repr([__version__, *map(importlib.metadata.version, _TOOLS)]).encode())
    return CACHE / kind / digest.hexdigest()[:16]


def _made(path: Path, make: Callable[[], object]) -> Path:
    """Return `path` after making it, unless it is there; test processes beside this one wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.making").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make()
    return path


def in_precision(bundle: Bundle, precision: Precision) -> Bundle:
    """Return a bundle whose manifest says that every network computes in that."""
    networks = {name: replace(network, precision=precision) for name, network in bundle.manifest.networks.items()}
    return replace(bundle, manifest=replace(bundle.manifest, precision=precision, networks=networks))


def inputs_of(bundle: Bundle, role: str) -> dict[str, NDArray[Any]]:
    """Return the same random inputs of a network each time, as large as in a run, for a batch of two."""
    random = np.random.default_rng(0)
    inputs: dict[str, NDArray[Any]] = {}
    for spec in bundle.network(role).inputs:
        shape = spec.resolve({"batch": 2})
        values = random.standard_normal(shape) * (0.2 if spec.name == "modulation" else 1)
        inputs[spec.name] = random.integers(0, 30, shape) if spec.dtype == "int64" else values.astype(spec.dtype)
    return inputs


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """Return the tiny checkpoint of a model; do not change it, copy it."""
    from cvx_deploy.exporters.sources.synth import synthesize

    def checkpoint(name: str) -> Path:
        path = _cache("checkpoints", _SYNTH) / name
        return _made(path, lambda: synthesize(name, "tiny", path))

    return checkpoint


@pytest.fixture(scope="session")
def exported(tiny: Tiny) -> Exported:
    """Return the bundle of a tiny checkpoint, at its own shape or at another; do not change it, copy it.

    With ``only`` the networks of one component alone are there, and those of the others lines of text: a test that
    looks at one at a shape or in a precision of its own need not have all traced.
    """
    from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
    from tests.untraced import with_tracing, without_tracing

    def bundle(name: str, only: str | None = None, **request: Any) -> Bundle:
        words = {key: "+".join(map(str, value)) if key == "shapes" else value for key, value in request.items()}
        suffix = "".join(f"-{key}{value}" for key, value in (words | ({"only": only} if only else {})).items())
        path = _cache("bundles", _SYNTH, _EXPORT) / f"{name}{suffix}"
        asked = ExportRequest(name, tiny(name), **request)
        with pytest.MonkeyPatch.context() as patch:
            with_tracing(patch)  # a test that goes without asks for a bundle that others will see, too
            if only:
                without_tracing(patch, *({"text_encoder", "transformer", "vae"} - {only}))
            _made(path, lambda: bundle_from_checkpoint(asked, path))
        return Bundle.open(path)

    return bundle


@pytest.fixture(scope="session")
def table(tiny: Tiny) -> Path:
    """Return a table of the activations of the tiny 5b; do not change it, copy it."""
    from cvx_deploy.exporters.quantization.calibrate import CalibrationRequest, calibrate
    from cvx_deploy.exporters.sources.checkpoint import Checkpoint

    checkpoint = Checkpoint(tiny("5b"))
    shape = Shape(9, checkpoint.limits.sample_height, checkpoint.limits.sample_width)
    request = CalibrationRequest(checkpoint, shape, ("a red ball",), steps=2)
    path = _cache("tables", _SYNTH, _CALIBRATE) / "calibration.safetensors"
    return _made(path, lambda: calibrate(request, path, SilentProgress()))


@pytest.fixture(scope="session")
def quantized(tiny: Tiny, table: Path) -> Quantized:
    """Return the bundle of the tiny 5b in a quantized precision; do not change it, copy it."""
    from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
    from cvx_deploy.exporters.quantization.quantized import Quantizing

    def bundle(precision: str, **quantizing: Any) -> Bundle:
        how = "".join(f"-{key}{value}" for key, value in quantizing.items())
        path = _cache("bundles", _SYNTH, _EXPORT, _CALIBRATE) / f"5b-{precision.replace('/', '-')}{how}"
        static = precision.startswith(("int8/", "fp8/")) or "=fp8" in precision
        asked = Quantizing(table if static else None, **quantizing)
        request = ExportRequest("5b", tiny("5b"), frames=9, precision=precision, quantizing=asked)
        _made(path, lambda: bundle_from_checkpoint(request, path))
        return Bundle.open(path)

    return bundle


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``model_name`` for all five models."""
    if "model_name" in metafunc.fixturenames:
        metafunc.parametrize("model_name", list(MODELS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Fail a test in which something failed with advice that cannot be followed, as far as its words go."""
    from tests.fixes import faults

    found: list[str] = []
    init = CvxError.__init__

    def noting(error: CvxError, what: str, *, fix: str) -> None:
        init(error, what, fix=fix)
        found.extend(f"{fault} (fix: {error.fix})" for fault in faults(error.fix))

    with mock.patch.object(CvxError, "__init__", noting):
        yield
    assert not found, found


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need an export, so that the others can be run in a minute: ``-m "not export"``."""
    for item in items:
        made = {"exported", "quantized", "table"} & set(getattr(item, "fixturenames", ()))
        if made or item.get_closest_marker("nightly") is not None:
            item.add_marker(pytest.mark.export)
