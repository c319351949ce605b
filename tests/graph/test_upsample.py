"""A 1x1x1 convolution gives the same before upsampling as after it, and stays where it would not."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from cvx_deploy.graph.upsample import convolve_before_upsampling

FLOAT = ir.TensorType(ir.DataType.FLOAT)
WEIGHT = np.random.default_rng(0).standard_normal((4, 2, 1, 1, 1), dtype=np.float32)


def constant(array: Any) -> ir.Node:
    return ir.node("Constant", [], attributes={"value": ir.tensor(np.array(array, np.int64))})


def resized(source: ir.Value, plane: ir.Value, frames: int, scale: int, mode: str) -> list[ir.Node]:
    """Return nodes that resize ``source (1, 2, f, h, w)`` to ``(1, 2, frames, scale * h, scale * w)``."""
    ahead, factor = constant([1, 2, frames]), constant([scale])
    larger = ir.node("Mul", [plane, factor.outputs[0]])
    sizes = ir.node("Concat", [ahead.outputs[0], larger.outputs[0]], attributes={"axis": 0})
    kind = {"mode": mode, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    resize = ir.node("Resize", [source, None, None, sizes.outputs[0]], attributes=kind)
    plane_sizes = ("h", "w") if scale == 1 else (f"{scale}*h", f"{scale}*w")
    resize.outputs[0].shape, resize.outputs[0].type = ir.Shape([1, 2, frames, *plane_sizes]), FLOAT
    return [ahead, factor, larger, sizes, resize]


def chunk(
    frames: list[int], scale: int = 3, *, mode: str = "nearest", kernel: int = 1, pad: int = 0, weight: Any = WEIGHT
) -> ir.Model:
    """Convolve latents whose first frame, if there are two numbers of frames, is upsampled by itself."""
    z = ir.Value(name="z", shape=ir.Shape([1, 2, 3 if len(frames) > 1 else 2, "h", "w"]), type=FLOAT)
    plane = ir.node("Shape", [z], attributes={"start": 3})
    nodes, pieces = [plane], []
    for start, end, count in zip((0, 1), (1, 3), frames, strict=False):
        source = z
        if len(frames) > 1:
            limits = [constant([limit]) for limit in (start, end, 2)]
            cut = ir.node("Slice", [z, *(limit.outputs[0] for limit in limits)])
            cut.outputs[0].shape, cut.outputs[0].type = ir.Shape([1, 2, end - start, "h", "w"]), FLOAT
            nodes += [*limits, cut]
            source = cut.outputs[0]
        nodes += resized(source, plane.outputs[0], count, scale, mode)
        pieces.append(nodes[-1].outputs[0])
    if len(pieces) > 1:
        nodes.append(ir.node("Concat", pieces, attributes={"axis": 2}))
    values = np.tile(weight, (1, 1, kernel, kernel, kernel))
    w = ir.Value(name="w", const_value=ir.tensor(values, name="w"), shape=ir.Shape(values.shape), type=FLOAT)
    bias = np.arange(4, dtype=np.float32)
    b = ir.Value(name="b", const_value=ir.tensor(bias, name="b"), shape=ir.Shape([4]), type=FLOAT)
    attributes = {"kernel_shape": [kernel] * 3, "pads": [pad] * 6, "strides": [1] * 3}
    conv = ir.node("Conv", [nodes[-1].outputs[0], w, b], attributes=attributes, name="norm.conv_y/Conv")
    conv.outputs[0].name, conv.outputs[0].type = "y", FLOAT
    graph = ir.Graph([z], conv.outputs, nodes=[*nodes, conv], initializers=[w, b], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def result(model: ir.Model, height: int = 5, width: int = 4) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    frames = session.get_inputs()[0].shape[2]
    z = np.random.default_rng(1).standard_normal((1, 2, frames, height, width), dtype=np.float32)
    return np.asarray(session.run(None, {"z": z})[0])


@pytest.mark.parametrize("plane", [(5, 4), (2, 7)])
@pytest.mark.parametrize(("frames", "scale"), [([2], 1), ([2], 3), ([8], 4), ([1, 2], 3), ([1, 8], 2), ([1, 2], 1)])
def test_a_convolution_before_upsampling_gives_the_same_to_the_bit(
    frames: list[int], scale: int, plane: tuple[int, int]
) -> None:
    before = result(chunk(frames, scale), *plane)
    model = chunk(frames, scale)
    assert convolve_before_upsampling(model) == 1
    np.testing.assert_array_equal(result(model, *plane), before)
    RemoveUnusedNodesPass()(model)
    assert sum(node.op_type == "Conv" for node in model.graph) == 1
    assert not any(node.op_type == "Resize" for node in model.graph)
    names = [node.name for node in model.graph if node.name and node.name.startswith("norm.conv_y/")]
    assert len(names) == len(set(names)) > 0


def test_another_weight_is_seen() -> None:
    model = chunk([8], weight=WEIGHT[::-1])
    convolve_before_upsampling(model)
    assert np.abs(result(model) - result(chunk([8]))).max() > 0.1


@pytest.mark.parametrize(
    "alike",
    [
        chunk([8], mode="linear"),
        chunk([8], kernel=3),
        chunk([8], pad=1),
        chunk([3]),  # 3 frames of 2: some are repeated, some are not
    ],
    ids=["interpolates", "sees neighbours", "pads", "repeats unevenly"],
)
def test_what_would_not_be_the_same_is_left_alone(alike: ir.Model) -> None:
    assert convolve_before_upsampling(alike) == 0
    assert any(node.op_type == "Resize" for node in alike.graph)
