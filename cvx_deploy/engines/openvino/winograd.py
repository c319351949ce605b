"""Convolutions with half of the products: Winograd's F(4, 3) along the height, when a network is loaded for a CPU.

Four rows of a 3x3x3 convolution take 12 products a column for each pair of channels. From six sums of their six rows of
input, and six of the kernel's three, they take six::

    y[4j + a] = sum over u of A[a, u] * (sum over h of G[u, h] w[h]) * (sum over r of B[u, r] x[4j + r - 1])

The sums are cheap: those of the input are depthwise convolutions, those of the kernel constants. What is left is a
convolution 3x1x3 over a quarter of the rows for each u; in two dimensions, 1x3. The result is the same but for
rounding: in float32 its relative error is some 2e-6, where that of the direct one is 4e-7; in half precision it would
be too large.

Sources: A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks (https://arxiv.org/abs/1509.09308); how
points give the three matrices, and that those other than 0, 1, -1, 2 and -2 round less: B. Barabasz et al., Error
Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks (https://arxiv.org/abs/1803.10986).
"""

import math
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13 as ops

Matrix = NDArray[np.float64]

_ROWS, _KERNEL_ROWS = 4, 3
_POINTS = (0.0, 1.5, -1.5, 2 / 3, -2 / 3)  # and infinity; they round a third less than 0, 1, -1, 2 and -2


def matrices() -> tuple[Matrix, Matrix, Matrix]:
    """Return B, G and A ``(6, 6)``, ``(6, 3)`` and ``(4, 6)``, as the formula above has them."""
    from numpy.polynomial import polynomial

    def without(place: int) -> Matrix:
        return np.asarray(polynomial.polyfromroots([*_POINTS[:place], *_POINTS[place + 1 :]]), np.float64)

    scales = [polynomial.polyval(point, without(place)) for place, point in enumerate(_POINTS)]
    kernel = [np.power(point, np.arange(_KERNEL_ROWS)) / scale for point, scale in zip(_POINTS, scales, strict=True)]
    inputs = [np.append(without(place), 0.0) for place in range(len(_POINTS))]
    output = [[*np.power(_POINTS, row), float(row == _ROWS - 1)] for row in range(_ROWS)]
    last = [0.0] * (_KERNEL_ROWS - 1) + [1.0]
    return np.array([*inputs, polynomial.polyfromroots(_POINTS)]), np.array([*kernel, last]), np.array(output)


_INPUT, _KERNEL, _OUTPUT = matrices()
_TAPS = len(_INPUT)
_LEAST_CHANNELS = 64  # below, the sums cost what they save
_LEAST_CELLS = 8192  # of the result; below, little is saved, by kernels of twice the bytes


def halve_products(model: openvino.Model) -> int:
    """Rewrite every convolution that gains by it, and return how many there were.

    Args:
        model: One that computes in float32, of static shapes.
    """
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution" and _gains(node)]
    for node in found:
        result = _rewritten(node)
        result.output(0).set_names(node.output(0).get_names())
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(result.output(0))
    return len(found)


def _gains(node: Any) -> bool:
    """Whether a convolution is one of 3x3 places, or 3x3x3, that keeps the size of a picture, and large enough."""
    kernel = list(node.input_value(1).get_shape())
    told = node.get_attributes()
    plain = {*told["strides"], *told["dilations"]} == {1}
    within = told["pads_begin"] == told["pads_end"] == [*[0] * (len(kernel) - 4), 1, 1]
    cells = math.prod(node.output(0).get_shape()) // kernel[0]
    large = kernel[-2:] == [3, 3] and min(kernel[:2]) >= _LEAST_CHANNELS and cells >= _LEAST_CELLS
    return plain and within and large and _constant(node.input_value(1)) is not None


def _constant(value: Any) -> Any:
    """Return the constant that a value is, or is converted from."""
    node = value.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _rewritten(node: Any) -> Any:
    """Return what stands for a convolution of ``(N, C, ..., H, W)``."""
    given, kernel = node.input_value(0), _constant(node.input_value(1)).get_data(dtype=np.float32)
    *_, height, _ = given.get_shape()
    frames = kernel.ndim - 4  # the axes before those of a picture: one, or none
    missing = -height % _ROWS
    above, below, beside = [*[0] * frames, 1, 0], [*[0] * frames, 1 + missing, 0], [*[0] * frames, 0, 1]
    step, one = [*[1] * frames, _ROWS, 1], [1] * (frames + 2)
    planes = []
    for taps, shares in zip(_INPUT, _KERNEL, strict=True):
        summed = ops.group_convolution(given, _depthwise(taps, kernel.shape[1], frames), step, above, below, one)
        flat = np.expand_dims(np.tensordot(kernel, shares.astype(np.float32), (2 + frames, 0)), 2 + frames)
        planes.append(ops.convolution(summed, ops.constant(flat), one, beside, beside, one))
    whole = _interleaved([_sum(planes, shares) for shares in _OUTPUT])
    if not missing:
        return whole
    start, end, stride, axis = (ops.constant(np.array([value])) for value in (0, height, 1, 2 + frames))
    return ops.slice(whole, start, end, stride, axis)


def _depthwise(taps: Matrix, channels: int, frames: int) -> Any:
    """Return the kernel that sums six rows of each channel."""
    return ops.constant(np.broadcast_to(taps.astype(np.float32)[:, None], (channels, 1, 1, *[1] * frames, _TAPS, 1)))


def _sum(terms: list[Any], factors: Matrix) -> Any:
    """Return the sum of tensors times their factors."""
    whole = None
    for term, factor in zip(terms, factors, strict=True):
        if factor != 0:
            scaled = term if factor == 1 else ops.multiply(term, ops.constant(np.float32(factor)))
            whole = scaled if whole is None else ops.add(whole, scaled)
    return whole


def _interleaved(rows: list[Any]) -> Any:
    """Return ``(..., H, W)`` of four tensors ``(..., H / 4, W)``, which hold every fourth row."""
    *outer, quarter, width = rows[0].output(0).get_shape()
    axis = len(outer) + 1
    parts = [ops.unsqueeze(row, ops.constant(np.int64(axis))) for row in rows]
    return ops.reshape(ops.concat(parts, axis), ops.constant(np.array([*outer, _ROWS * quarter, width])), False)
