"""Q/DQ nodes around the linear layers and the attention of a graph.

Before: ``MatMul(x, Transpose(W))``
After:  ``MatMul(DQ(Q(x * smoother, s), s), DQ(Wq, weight_scale))``, Wq of shape (in, out)

The smoother stands at x once for all layers that take the same x, where the scheme smooths; the pair, where activations
are quantized, before each layer by itself, since ONNX Runtime multiplies in 8 bits only where a Q serves one DQ, and
the DQ one product. Zero points are zero; activations state theirs, since it fuses no pair without. Scales are of the
type the layer computes in: TensorRT takes no two types of them in one product. A weight keeps its initializer's name;
``<layer>.weight_scale`` and ``<layer>.input_smoother`` join it.

Before: ``Attention(q, k, v)``
After:  ``MatMul(QDQ(Softmax(MatMul(QDQ(q), QDQ(k^T)) * scale)), QDQ(v))``, in E4M3

In this form, and with the pair after Softmax, TensorRT runs all of it as one kernel; around ``Attention`` itself it
rounds to 8 bits and multiplies in 16.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cvx_deploy.graph.patterns import constant_node, made, producer
from cvx_deploy.precision import SCHEMES, Scheme
from cvx_deploy.quantize.layers import leader

WEIGHT_SCALE, SMOOTHER = "weight_scale", "input_smoother"
_E4M3_LARGEST = SCHEMES["fp8"].largest


@dataclass(frozen=True)
class Placement:
    """What to quantize, and the ranges of activations.

    Attributes:
        layers: Every layer to quantize, by its name in the checkpoint; the scale of its input, None for weights only.
        attention: By block, such as ``transformer_blocks.0``: the scales of query, key and value; blocks that are not
            there keep their attention.
    """

    scheme: Scheme
    layers: Mapping[str, float | None]
    attention: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)


def group_size(scheme: Scheme, inputs: int) -> int:
    """Return how many weights along a layer's input share a scale: the scheme's, or what divides a narrow input."""
    return inputs if scheme.group is None else math.gcd(inputs, scheme.group)


def quantize_graph(model: ir.Model, placement: Placement, name_of: Callable[[str], str]) -> None:
    """Put Q/DQ nodes into a graph, in place, before its weights are bound.

    Args:
        model: A traced network.
        placement: What to quantize.
        name_of: From the name of an initializer to that of the tensor in the checkpoint.

    Raises:
        ValueError: The graph lacks a layer that is to be quantized, or its attention.
    """
    smoothed: dict[tuple[ir.Value, str], ir.Value] = {}
    missing = set(placement.layers)
    for matmul, weight in _linears(model):
        layer = name_of(str(weight.name)).removesuffix(".weight")
        if layer in missing:
            missing.remove(layer)
            _quantize_layer(model, matmul, weight, layer, placement, smoothed)
    attention = set(placement.attention)
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        block = _block_of(node, placement)
        if block in attention:
            attention.remove(block)
            _quantize_attention(model, node, placement.attention[block])
    if missing or attention:
        raise ValueError(f"the graph has no {min(missing or attention)} to quantize")


def _linears(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Yield every product with a transposed weight, and the weight."""
    for node in list(model.graph):
        transpose = producer(node.inputs[1], "Transpose") if node.op_type == "MatMul" else None
        weight = None if transpose is None else transpose.inputs[0]
        if weight is not None and weight.is_initializer():
            yield node, weight


def _quantize_layer(
    model: ir.Model,
    matmul: ir.Node,
    weight: ir.Value,
    layer: str,
    placement: Placement,
    smoothed: dict[tuple[ir.Value, str], ir.Value],
) -> None:
    scheme, scale = placement.scheme, placement.layers[layer]
    x, transposed = matmul.inputs
    assert x is not None
    assert transposed is not None
    if scale is not None:
        key = (x, leader(layer))
        if scheme.smooth and key not in smoothed:
            smoothed[key] = _smoothed(model, matmul, x, _first(weight, layer))
        assert scheme.activations is not None
        x = smoothed.get(key, x)
        matmul.replace_input_with(0, _rounded(model, matmul, x, scale, scheme.activations, f"{matmul.name}/Input"))
    matmul.replace_input_with(1, _dequantized_weight(model, matmul, weight, transposed, scheme))


def _first(weight: ir.Value, layer: str) -> str:
    """Return the name, as initializers have it, of the layer that stands for all that take the same input."""
    own = str(weight.name).removesuffix(".weight")
    return own.removesuffix(layer) + leader(layer) if own.endswith(layer) else own


def _smoothed(model: ir.Model, matmul: ir.Node, x: ir.Value, first: str) -> ir.Value:
    assert x.shape is not None
    smoother = _initializer(model, f"{first}.{SMOOTHER}", (x.shape[-1],), x.dtype)
    smooth = made("Mul", [x, smoother], x, f"{matmul.name}/Smooth")
    model.graph.insert_before(matmul, smooth)
    return smooth.outputs[0]


def _rounded(model: ir.Model, before: ir.Node, x: ir.Value, scale: float, dtype: str, name: str) -> ir.Value:
    """Insert QuantizeLinear and DequantizeLinear, and return what comes out."""
    target = ir.DataType[dtype]
    assert x.dtype is not None
    factor = constant_node(np.array(scale, x.dtype.numpy()), f"{name}/Scale")
    zero = constant_node(np.array(0, target.numpy()), f"{name}/Zero")
    quantize = ir.node("QuantizeLinear", [x, factor.outputs[0], zero.outputs[0]], name=f"{name}/Quantize")
    quantize.outputs[0].type, quantize.outputs[0].shape = ir.TensorType(target), x.shape
    inputs = [quantize.outputs[0], factor.outputs[0], zero.outputs[0]]
    dequantize = made("DequantizeLinear", inputs, x, f"{name}/Dequantize")
    model.graph.insert_before(before, [factor, zero, quantize, dequantize])
    return dequantize.outputs[0]


def _dequantized_weight(
    model: ir.Model, matmul: ir.Node, weight: ir.Value, transposed: ir.Value, scheme: Scheme
) -> ir.Value:
    """Give a weight its new type and layout, and return it dequantized."""
    assert weight.shape is not None
    outputs, inputs = (int(size) for size in weight.shape)  # type: ignore[arg-type]
    compute, name = weight.dtype, str(weight.name)
    assert compute is not None
    group = group_size(scheme, inputs)
    del model.graph.initializers[name]
    stored = _initializer(model, name, (inputs, outputs), ir.DataType[scheme.weights])
    by_group = scheme.group is not None
    shape = (inputs // group, outputs) if by_group else (outputs,)
    scales = _initializer(model, f"{name.removesuffix('.weight')}.{WEIGHT_SCALE}", shape, compute)
    attributes = {"axis": 0, "block_size": group} if by_group else {"axis": 1}
    node = made("DequantizeLinear", [stored, scales], transposed, f"{matmul.name}/Weight", attributes)
    model.graph.insert_before(matmul, node)
    return node.outputs[0]


def _initializer(model: ir.Model, name: str, shape: tuple[object, ...], dtype: ir.DataType | None) -> ir.Value:
    if name not in model.graph.initializers:
        assert dtype is not None
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))  # type: ignore[arg-type]
        model.graph.initializers[name] = value
    return model.graph.initializers[name]


def _block_of(node: ir.Node, placement: Placement) -> str | None:
    """Return the block that an attention belongs to: nodes are named by module."""
    return next((block for block in placement.attention if f"{block}." in f"{node.name}."), None)


def _quantize_attention(model: ir.Model, node: ir.Node, scales: tuple[float, float, float]) -> None:
    name, output = str(node.name), node.outputs[0]
    query, key, value = node.inputs[:3]
    assert query is not None
    assert key is not None
    assert value is not None
    assert query.shape is not None
    assert query.dtype is not None
    attribute = node.attributes.get("scale")
    factor = 1 / math.sqrt(int(query.shape[-1])) if attribute is None else attribute.as_float()  # type: ignore[arg-type]
    rounded = [
        _rounded(model, node, tensor, scale, "FLOAT8E4M3FN", f"{name}/{part}")
        for tensor, scale, part in zip((query, key, value), scales, ("Query", "Key", "Value"), strict=True)
    ]
    transposed = ir.node("Transpose", [rounded[1]], {"perm": [0, 1, 3, 2]}, name=f"{name}/Transpose")
    transposed.outputs[0].type = key.type
    scores = ir.node("MatMul", [rounded[0], transposed.outputs[0]], name=f"{name}/Scores")
    constant = constant_node(np.array(factor, query.dtype.numpy()), f"{name}/Factor")
    scaled = ir.node("Mul", [scores.outputs[0], constant.outputs[0]], name=f"{name}/Scale")
    softmax = ir.node("Softmax", [scaled.outputs[0]], {"axis": -1}, name=f"{name}/Softmax")
    assert key.shape is not None
    tokens = ir.Shape([*query.shape[:-1], key.shape[-2]])
    for step in (scores, scaled, softmax):
        step.outputs[0].type, step.outputs[0].shape = query.type, tokens
    model.graph.insert_before(node, [transposed, scores, constant, scaled, softmax])
    # A softmax is at most 1.
    weights = _rounded(model, node, softmax.outputs[0], 1 / _E4M3_LARGEST, "FLOAT8E4M3FN", f"{name}/Weights")
    result = made("MatMul", [weights, rounded[2]], output, name)
    model.graph.insert_before(node, result)
    result.outputs[0].name = output.name
    output.replace_all_uses_with(result.outputs[0])
    model.graph.remove(node, safe=True)
