"""A traced module's graph before and after a rewrite, both run by ONNX Runtime."""

from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass


def traced(module: torch.nn.Module, *inputs: torch.Tensor) -> ir.Model:
    """Return a module's graph as the exporter writes it."""
    program = torch.onnx.export(module.eval(), inputs, dynamo=True, optimize=False, opset_version=23, verbose=False)
    assert program is not None
    return program.model


def run(model: ir.Model, *inputs: torch.Tensor) -> NDArray[Any]:
    """Return what ONNX Runtime makes of the inputs, none of it optimized."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    names = [value.name for value in session.get_inputs()]
    feeds = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    (found,) = session.run(None, feeds)
    return found


def op_types(model: ir.Model) -> list[str]:
    """Return the operators of a graph that anything depends on."""
    RemoveUnusedNodesPass()(model)
    return [node.op_type for node in model.graph]
