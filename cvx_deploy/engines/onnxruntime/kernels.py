"""How many of a quantized network's layers ONNX Runtime runs in kernels for few bits, told from its optimized graph."""

from collections import Counter
from pathlib import Path

from cvx_deploy.bundle.schema import Quantization
from cvx_deploy.precision import SchemeName

_EIGHT_BITS = ("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "QGemm", "DynamicQuantizeMatMul")
_FEW_BITS = ("MatMulNBits",)
_LATE = "DequantizeLinear"  # of a weight that stays in its file, layer by layer; see `cvx_deploy.graph.streamed`
_KERNELS: dict[SchemeName, tuple[str, ...]] = {
    "int8": _EIGHT_BITS,
    "int8wo": (*_FEW_BITS, _LATE),
    "int4wo": _FEW_BITS,
}


def quantized_kernels(optimized: Path, scheme: SchemeName) -> dict[str, int]:
    """Return how often each kernel that a scheme is for stands in a graph.

    A layer without one is multiplied in float32, its weights dequantized when they are loaded.

    Args:
        optimized: The graph as ONNX Runtime runs it, without weights.
        scheme: int8, int8wo or int4wo: fp8 has no such kernels on a CPU.
    """
    import onnx

    nodes = onnx.load(optimized, load_external_data=False).graph.node
    return dict(Counter(node.op_type for node in nodes if node.op_type in _KERNELS.get(scheme, ())))


def shortfall(kernels: dict[str, int], quantization: Quantization) -> tuple[str, ...]:
    """Return what is wrong where some quantized layers are not run as such."""
    run = sum(kernels.values())
    if run == quantization.layers or quantization.scheme not in _KERNELS:
        return ()
    return (
        f"ONNX Runtime multiplies {quantization.layers - run} of its {quantization.layers} quantized layers in float32",
    )
