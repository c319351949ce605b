"""Weights that stay in their file: the same outputs, each conversion as late as it can be, and no copy that stays."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime import graphs
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.graph import streamed
from cvx_deploy.graph.streamed import stream_weights
from tests.conftest import Exported, inputs_of
from tests.tolerances import REWRITE_RELATIVE

WIDTH, LAYERS, WORDS = 16, 6, 40


def stack(kind: int = TensorProto.INT8) -> onnx.ModelProto:
    """Return products one after another, of a looked-up row, whose weights lie outside and are converted."""
    nodes = [
        helper.make_node("Cast", ["table"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["wide", "words"], ["x0"]),
    ]
    weights = [outside("table", TensorProto.FLOAT16, (WORDS, WIDTH))]
    for layer in range(LAYERS):
        converted = helper.make_node("DequantizeLinear", [f"w{layer}", "scale"], [f"c{layer}"], axis=1)
        if kind != TensorProto.INT8:
            converted = helper.make_node("Cast", [f"w{layer}"], [f"c{layer}"], to=TensorProto.FLOAT)
        nodes += [
            converted,
            helper.make_node("MatMul", [f"x{layer}", f"c{layer}"], [f"m{layer}"]),
            helper.make_node("Tanh", [f"m{layer}"], [f"x{layer + 1}"]),
        ]
        weights.append(outside(f"w{layer}", kind, (WIDTH, WIDTH)))
    scale = numpy_helper.from_array(np.full(WIDTH, 0.01, np.float32), "scale")
    words = helper.make_tensor_value_info("words", TensorProto.INT64, (3,))
    y = helper.make_tensor_value_info(f"x{LAYERS}", TensorProto.FLOAT, (3, WIDTH))
    graph = helper.make_graph(nodes, "stack", [words], [y], [*weights, scale])
    return helper.make_model(graph, opset_imports=[helper.make_operatorsetid("", 23)], ir_version=10)


def outside(name: str, kind: int, shape: tuple[int, ...]) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "w.bin", "offset": 0, "length": 2 * int(np.prod(shape))}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the smallest weights count as large."""
    monkeypatch.setattr(streamed, "_LARGE", 1)
    monkeypatch.setattr(graphs, "LARGE_NETWORK", 0)


def kernels(model: onnx.ModelProto, folder: Path) -> list[str]:
    """Return the operators that ONNX Runtime runs, in its order."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "run")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, disabled_optimizers=["QDQSelectorActionTransformer"]
    )
    rng = np.random.default_rng(0)
    types = {"tensor(int8)": np.int8, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    session.run(None, {i.name: rng.integers(0, 9, i.shape).astype(types[i.type]) for i in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text())
    return [event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")]


def most_converted(order: list[str]) -> int:
    """Return how many conversions are ahead of the product that needs them, at most."""
    ahead = [
        order[: place + 1].count("DequantizeLinear") - order[:place].count("MatMul") for place in range(len(order))
    ]
    return max(ahead)


def test_each_weight_is_converted_just_before_it_is_used(tmp_path: Path) -> None:
    model = stack()
    assert {weight.name for weight in stream_weights(model)} == {"table", *(f"w{layer}" for layer in range(LAYERS))}
    assert most_converted(kernels(model, tmp_path)) == 1


def test_twin_in_another_order_all_are_converted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_convert_late", lambda *_: None)
    model = stack()
    stream_weights(model)
    assert most_converted(kernels(model, tmp_path)) == LAYERS


def test_of_an_embedding_only_the_rows_that_are_looked_up_are_converted() -> None:
    model = stack()
    stream_weights(model)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    [cast] = [node for node in inferred.graph.node if node.op_type == "Cast"]
    [rows] = [value for value in inferred.graph.value_info if value.name == cast.input[0]]
    assert [axis.dim_value for axis in rows.type.tensor_type.shape.dim] == [3, WIDTH]
    assert rows.type.tensor_type.elem_type == TensorProto.FLOAT16


def test_what_a_convolution_reads_stays_a_constant() -> None:
    model = stack(TensorProto.FLOAT16)
    model.graph.node.append(helper.make_node("Conv", ["table", "w0"], ["other"]))
    assert {"table", "w0"}.isdisjoint(weight.name for weight in stream_weights(model))


def outputs(bundle: Bundle, role: str) -> dict[str, NDArray[Any]]:
    with OrtBackend(bundle, 1).load(role, {"batch": 2}) as session:
        return {name: value.numpy().copy() for name, value in session.run(inputs_of(bundle, role)).items()}


def worst(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> float:
    return max(float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in expected)


@pytest.mark.parametrize("role", ["text_encoder", "modulation", "transformer"])
@pytest.mark.parametrize("precision", ["fp32", "int8wo/fp32"])
def test_a_network_puts_out_the_same(
    role: str, precision: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported("5b", precision=precision)
    found = outputs(bundle, role)
    monkeypatch.setattr(graphs, "LARGE_NETWORK", 1 << 60)
    assert worst(found, outputs(bundle, role)) < REWRITE_RELATIVE["fp32"]


def test_twin_other_bytes_in_the_place_of_a_weight_are_found(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cvx_deploy.engines.onnxruntime import backend

    expected, bind = outputs(exported("5b"), "transformer"), backend._held_in_file
    monkeypatch.setattr(backend, "_held_in_file", lambda weight, content: bind(weight, content[::-1].copy()))
    found = outputs(exported("5b"), "transformer")
    assert not worst(found, expected) < REWRITE_RELATIVE["fp32"]
