"""Engines for CPUs compute quantized networks as the graph is written: no activation in 8 bits that is not so there."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.doctor import diagnose
from cvx_deploy.engines.backend import Backend
from cvx_deploy.engines.onnxruntime import backend as ort
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.engines.openvino.backend import OpenVinoBackend
from cvx_deploy.errors import EngineError
from cvx_deploy.measure.cpu import overflows_in_int8
from tests.conftest import Quantized, inputs_of
from tests.tolerances import INT8_RELATIVE, NETWORK_RELATIVE

ROLES = ("transformer", "text_encoder")
BACKENDS = (OrtBackend, OpenVinoBackend)
LIMITS = {"int8/fp32": INT8_RELATIVE, "int8wo/fp32": NETWORK_RELATIVE, "int4wo/fp32": NETWORK_RELATIVE}


class PlainBackend(OrtBackend):
    """ONNX Runtime without an optimization: each node by itself, every product in float32."""

    def _options(self, *words: Any) -> onnxruntime.SessionOptions:
        options = super()._options(*words)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return options


def output(backend: Backend, role: str) -> NDArray[Any]:
    with backend.load(role, {"batch": 2}) as session:
        (found,) = session.run(inputs_of(backend.bundle, role)).values()
        return backend.to_host(found).astype(np.float64)


def apart(bundle: Bundle, role: str, kind: Any) -> float:
    """Return the largest difference from the plain evaluation over the largest value."""
    expected = output(PlainBackend(bundle, 1), role)
    return float(np.abs(output(kind(bundle, 1), role) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("precision", LIMITS)
def test_what_is_computed_is_what_is_written(precision: str, kind: Any, quantized: Quantized) -> None:
    if kind is OpenVinoBackend and precision == "int8/fp32" and overflows_in_int8():
        pytest.skip("this CPU has no VNNI, and OpenVINO is refused")
    bundle = quantized(precision)
    assert apart(bundle, "transformer", kind) < LIMITS[precision]
    assert apart(bundle, "text_encoder", kind) < NETWORK_RELATIVE  # weights alone


@pytest.mark.parametrize("precision", ["int8wo/fp32", "int4wo/fp32"])
def test_twin_activations_in_int8_are_seen(
    precision: str, quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "_EXACT_WEIGHTS", ("session.qdq_matmulnbits_accuracy_level", "4"))
    for role in ROLES:
        assert apart(quantized(precision), role, OrtBackend) > NETWORK_RELATIVE


@pytest.mark.skipif(not overflows_in_int8(), reason="8-bit products do not overflow on this CPU")
def test_twin_an_overflow_is_seen(quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "overflows_in_int8", lambda: False)
    assert apart(quantized("int8/fp32"), "transformer", OrtBackend) > INT8_RELATIVE


def test_openvino_refuses_int8_where_it_overflows(quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = quantized("int8/fp32")
    for module in ("cvx_deploy.doctor", "cvx_deploy.engines.openvino.backend"):
        monkeypatch.setattr(f"{module}.overflows_in_int8", lambda: True)
    with pytest.raises(EngineError, match="no VNNI") as raised:
        OpenVinoBackend(bundle)
    assert "--engine onnxruntime" in raised.value.fix
    OpenVinoBackend(quantized("int8wo/fp32"))
    notes = [one for one in diagnose(bundle.path.parent).findings if one.subject == f"bundle {bundle.path.name}"]
    assert any("no VNNI" in one.what for one in notes)
