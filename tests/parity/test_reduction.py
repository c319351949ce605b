"""What an engine refuses or runs wrong is cut down to the nodes that show it, and to nothing where it runs right."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime import backend, graphs
from cvx_deploy.errors import EngineError
from cvx_deploy.measure.thresholds import THRESHOLDS
from cvx_deploy.miniatures import miniature
from cvx_deploy.parity import reduction
from cvx_deploy.parity.cases import Case
from cvx_deploy.parity.reduction import Fault, Reduction, reduced
from cvx_deploy.progress import SilentProgress
from tests.command import cvx
from tests.parity import planted
from tests.parity.test_check import with_graph

pytest.importorskip("polygraphy", reason="polygraphy is not installed")
pytest.importorskip("onnx_graphsurgeon", reason="onnx-graphsurgeon is not installed")
LIMIT = THRESHOLDS["fp32"].relative_l2


@pytest.fixture(scope="module")
def mini() -> Bundle:
    return Bundle.open(miniature("mini"))


def case(bundle: Bundle, role: str = "transformer") -> Case:
    rng, sizes = np.random.default_rng(0), {"batch": 1}
    specs = bundle.network(role).inputs
    return Case("random", sizes, {spec.name: rng.standard_normal(spec.resolve(sizes), np.float32) for spec in specs})


def cut_down(bundle: Bundle, fault: Fault, folder: Path) -> Reduction:
    return reduced(bundle, "transformer", case(bundle), fault, folder, SilentProgress())


def operators(folder: Path) -> list[str]:
    return [node.op_type for node in onnx.load(folder / "reduced.onnx").graph.node]


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a fault in ONNX Runtime, here and where pieces are checked."""
    monkeypatch.setattr(backend, "graph_for_cpu", planted.wrong(graphs.graph_for_cpu))
    monkeypatch.setattr(reduction, "CHECK", (sys.executable, planted.__file__))


@pytest.mark.usefixtures("wrong_kernel")
def test_a_wrong_kernel_is_cut_down_to_its_nodes_by_polygraphy(mini: Bundle, tmp_path: Path) -> None:
    found = cut_down(mini, Fault("onnxruntime", limit=LIMIT), tmp_path / "out")
    assert operators(tmp_path / "out") == ["Add", "Gelu"], "neither shows it alone"
    assert (found.network, found.nodes) == ("transformer", 2)
    assert found.of > 500
    session = onnxruntime.InferenceSession(tmp_path / "out" / "reduced.onnx")
    names = [value.name for value in session.get_outputs()]
    given, expected = (dict(np.load(tmp_path / "out" / file)) for file in ("inputs.npz", "expected.npz"))
    for name, array in zip(names, session.run(names, given), strict=True):
        np.testing.assert_allclose(array, expected[name], atol=1e-5)


def test_twin_a_network_that_runs_right_is_not_cut_down(mini: Bundle, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="says the same node by node"):
        cut_down(mini, Fault("onnxruntime", limit=LIMIT), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_that_is_too_large_for_one_file_is_refused(
    mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "_LARGEST", 1000)
    with pytest.raises(EngineError, match="more than one ONNX file holds"):
        cut_down(mini, Fault("onnxruntime", limit=LIMIT), tmp_path / "out")


def with_determinant(folder: Path) -> Bundle:
    """Return the miniature with an operator that TensorRT has not, and ONNX Runtime has, before its output."""

    def change(graph: onnx.GraphProto) -> None:
        last, out = graph.node[-1], graph.output[0].name
        last.output[0] = "before"
        graph.node.append(onnx.helper.make_node("Det", ["before"], ["det"], name="planted/Det"))
        graph.node.append(onnx.helper.make_node("ReduceSum", ["det"], ["sum"], name="planted/Sum", keepdims=0))
        graph.node.append(onnx.helper.make_node("Add", ["before", "sum"], [out], name="planted/Add"))

    return with_graph(Bundle.open(miniature("mini")), folder, change)


def test_a_node_that_tensorrt_refuses_is_cut_out(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    bundle = with_determinant(tmp_path / "bundle")
    found = cut_down(bundle, Fault("tensorrt-rtx", said="this machine has no NVIDIA driver"), tmp_path / "out")
    assert operators(tmp_path / "out") == ["Det"]
    assert found.nodes == 1
    said = json.loads((tmp_path / "out" / "fault.json").read_text(encoding="utf-8"))["said"]
    assert "planted/Det (Det)" in said
    assert not list(miniature("mini").glob("engines"))


def test_twin_a_network_that_compiles_is_not_cut_down(mini: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    fault = Fault("tensorrt-rtx", said="this machine has no NVIDIA driver")
    with pytest.raises(EngineError, match="compiles modulation as a whole; this machine has no NVIDIA driver"):
        reduced(
            mini, "modulation", Case("", {}, {"timestep": np.array([5])}), fault, tmp_path / "out", SilentProgress()
        )


@pytest.mark.nightly
@pytest.mark.usefixtures("wrong_kernel")
def test_a_check_reduces_what_its_first_failing_rung_runs_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Any, exported: Any
) -> None:
    from tests.parity.test_check import climbed

    asked: list[tuple[str, Fault, Path]] = []

    def noted(_: Bundle, role: str, __: Case, fault: Fault, folder: Path, ___: Any) -> Reduction:
        asked.append((role, fault, folder))
        return Reduction(role, 2, 900, str(folder))

    monkeypatch.setattr("cvx_deploy.parity.check.reduced", noted)
    found = climbed(exported("5b"), tiny("5b"), exported("5b", rewrites=()), reduce=tmp_path)
    assert asked[0] == ("transformer", Fault("onnxruntime", limit=LIMIT), tmp_path / "reduced-transformer")
    assert "transformer: 2 of its 900 nodes still show it" in str(found)
    assert found.as_dict()["reduced"][0]["nodes"] == 2


def test_reduce_needs_a_place_and_polygraphy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    assert cvx("check", "--model", "mini", "--reduce").code == 2
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "polygraphy" else find(name))
    line = cvx("check", "--model", "mini", "--reduce", "--output", tmp_path / "out").failure()
    assert "needs polygraphy" in line
