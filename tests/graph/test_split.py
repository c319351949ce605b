"""Split without sequences gives what the sequence gave, and leaves alone what it cannot know."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from cvx_deploy.graph.split import split_without_sequences


def sequence_graph(sizes: int | list[int], indices: list[int], *, constant: bool = True) -> ir.Model:
    """Build ``SequenceAt(SplitToSequence(x (2, 7), sizes), i)`` for every index."""
    x = ir.Value(name="x", shape=ir.Shape([2, 7]), type=ir.TensorType(ir.DataType.FLOAT))
    where = ir.Value(name="where", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    lengths = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(sizes, np.int64))})
    split = ir.node("SplitToSequence", [x, lengths.outputs[0]], attributes={"axis": 1})
    nodes, outputs = [lengths, split], []
    for index in indices:
        at = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(index, np.int64))})
        piece = ir.node("SequenceAt", [split.outputs[0], at.outputs[0] if constant else where])
        piece.outputs[0].name = f"piece{index}"
        piece.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        nodes += [at, piece]
        outputs.append(piece.outputs[0])
    inputs = [x] if constant else [x, where]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def results(model: ir.Model) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.arange(14, dtype=np.float32).reshape(2, 7)})


@pytest.mark.parametrize(("sizes", "indices"), [(3, [0, 1, 2]), ([4, 2, 1], [2, 0]), (7, [0])])
def test_pieces_are_the_same_to_the_bit(sizes: int | list[int], indices: list[int]) -> None:
    before = results(sequence_graph(sizes, indices))
    model = sequence_graph(sizes, indices)
    assert split_without_sequences(model) == 1
    assert {node.op_type for node in model.graph} <= {"Constant", "Split"}
    for found, expected in zip(results(model), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_piece_taken_by_a_computed_index_is_left_alone() -> None:
    model = sequence_graph(3, [0], constant=False)
    assert split_without_sequences(model) == 0
    assert any(node.op_type == "SplitToSequence" for node in model.graph)
