"""A file of a few bytes that asks for gigabytes, or never ends, is refused before an engine loads it."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.graph.bounded import check_bounded, most_values
from cvx_deploy.miniatures import MINIATURES, miniature
from cvx_deploy.shape import Shape
from tests.command import cvx
from tests.conftest import Exported, Quantized

MOST = most_values(Shape(9, 48, 48))
HUGE = 1_600_000_000


def ints(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def floats(name: str, *values: float) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.float32), name)


def graph(nodes: list[onnx.NodeProto], constants: list[TensorProto]) -> bytes:
    taken = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", 226])
    given = helper.make_tensor_value_info("prompt_embeds", TensorProto.FLOAT, None)
    made = helper.make_graph(nodes, "g", [taken], [given], constants)
    opset = [helper.make_opsetid("", 20)]
    return bytes(helper.make_model(made, opset_imports=opset, ir_version=10).SerializeToString())


def expanding(*sizes: int) -> bytes:
    return graph([helper.make_node("Expand", ["x", "s"], ["prompt_embeds"])], [floats("x", 0.0), ints("s", *sizes)])


def unraw(tensor: TensorProto) -> TensorProto:
    """Return a constant whose values lie in the field for integers."""
    return helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, numpy_helper.to_array(tensor).tolist())


ENDLESS = helper.make_graph([helper.make_node("Identity", ["c"], ["d"])], "body", [], [])
BOMBS: dict[str, bytes] = {
    "a filling operator": graph([helper.make_node("ConstantOfShape", ["s"], ["prompt_embeds"])], [ints("s", HUGE)]),
    "tiles": graph([helper.make_node("Tile", ["x", "s"], ["prompt_embeds"])], [floats("x", 0.0), ints("s", HUGE)]),
    "one axis": expanding(HUGE),
    "two axes": expanding(40_000, 40_000),
    "sizes in a field of their own": graph(
        [helper.make_node("Expand", ["x", "s"], ["prompt_embeds"])], [floats("x", 0.0), unraw(ints("s", HUGE))]
    ),
    "sizes in a node": graph(
        [
            helper.make_node("Constant", [], ["s"], value_ints=[40_000, 40_000]),
            helper.make_node("Expand", ["x", "s"], ["prompt_embeds"]),
        ],
        [floats("x", 0.0)],
    ),
    "sizes put together": graph(
        [
            helper.make_node("Concat", ["a", "a"], ["b"], axis=0),
            helper.make_node("Cast", ["b"], ["s"], to=TensorProto.INT64),
            helper.make_node("Expand", ["x", "s"], ["prompt_embeds"]),
        ],
        [floats("x", 0.0), ints("a", 40_000)],
    ),
    "scales": graph(
        [helper.make_node("Resize", ["x", "", "s"], ["prompt_embeds"])], [floats("x", 0.0), floats("s", 4e4, 4e4)]
    ),
    "edges": graph([helper.make_node("Pad", ["x", "s"], ["prompt_embeds"])], [floats("x", 0.0), ints("s", 0, HUGE)]),
    "a range": graph(
        [helper.make_node("Range", ["a", "s", "b"], ["prompt_embeds"])], [ints("a", 0), ints("s", HUGE), ints("b", 1)]
    ),
    "a constant's own shape": graph([], [TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 20, 1 << 20])]),
    "a loop": graph([helper.make_node("Loop", ["n", "c"], ["prompt_embeds"], body=ENDLESS)], [ints("n", 1 << 62)]),
    "cut": expanding(9)[:-3],
    "no protobuf": b"\xff" * 64,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_would_take_any_amount_of_memory_or_time_is_refused(bomb: str) -> None:
    with pytest.raises(ValueError, match=r"it |its "):
        check_bounded(BOMBS[bomb], MOST)


@pytest.mark.parametrize("sizes", [(2, 226), (3, 1 << 20)])
def test_twin_small_constants_are_let_through(sizes: tuple[int, ...]) -> None:
    check_bounded(expanding(*sizes), MOST)


@pytest.mark.parametrize("name", MINIATURES)
def test_packaged_graphs_are_let_through(name: str) -> None:
    for path in miniature(name).glob("*.onnx"):
        check_bounded(path.read_bytes(), MOST)


def test_exported_graphs_are_let_through(model_name: str, exported: Exported) -> None:
    bundle = exported(model_name)
    for path in bundle.path.glob("*.onnx"):
        check_bounded(path.read_bytes(), most_values(bundle.shape))


@pytest.mark.parametrize("precision", ["int8/fp32", "int4wo/fp32"])
def test_quantized_graphs_are_let_through(precision: str, quantized: Quantized) -> None:
    bundle = quantized(precision)
    for path in bundle.path.glob("*.onnx"):
        check_bounded(path.read_bytes(), most_values(bundle.shape))


@pytest.fixture
def hostile(tmp_path: Path) -> Bundle:
    """A miniature whose text encoder asks for 6 GB, with a manifest that vouches for it."""
    folder = Path(shutil.copytree(miniature("mini"), tmp_path / "bundle"))
    data = BOMBS["one axis"]
    (folder / "text_encoder.onnx").write_bytes(data)
    raw = json.loads((folder / MANIFEST).read_bytes())
    entry = {"path": "text_encoder.onnx", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    raw["networks"]["text_encoder"]["file"] = entry
    (folder / MANIFEST).write_text(json.dumps(raw))
    return Bundle.open(folder)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_run_of_such_a_bundle_is_one_clear_line(engine: str, hostile: Bundle, tmp_path: Path) -> None:
    words = ("--prompt", "x", "--engine", engine, "--output", tmp_path / "video.npy")
    line = cvx("run", "--bundle", hostile.path, *words).failure()
    assert line.startswith(f"error: {hostile.path}/text_encoder.onnx is damaged: its Expand makes a tensor of 1.6e+09")


def test_verify_finds_it(hostile: Bundle) -> None:
    outcome = cvx("verify", "--bundle", hostile.path, "--quick", "--load")
    assert outcome.code == 1
    assert "its Expand makes a tensor of 1.6e+09 values" in outcome.out
