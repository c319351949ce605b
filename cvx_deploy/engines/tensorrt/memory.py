"""How much host memory a build takes, told before it begins."""

import math
from collections.abc import Iterable
from typing import Final

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import EngineError

_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
_QUANTIZED_BITS = {"INT8": 8, "FLOAT8E4M3FN": 8, "INT4": 4}
# An upper bound of the builds in benchmarks/results/build.json: T5-XXL took 1.63 times its weights, the 5b
# transformer 1.40 times.
_BUILD_BASE: Final = 600 << 20
_BUILD_PER_WEIGHT_BYTE: Final = 1.65


def require_memory(networks: Iterable[tuple[str, int]], kind: str, bundle: Bundle) -> None:
    """Raise EngineError unless the machine has the memory that each build needs, one after the other.

    Args:
        networks: Name and weight bytes, in the type the network computes in, of everything to build.
        kind: The engine kind, for the message.
        bundle: Whose networks they are.
    """
    import psutil

    available = psutil.virtual_memory().available
    for name, weight_bytes in networks:
        needed = build_memory(weight_bytes)
        if needed > available:
            raise EngineError(
                f"building {name} of {bundle.path} with {kind} takes about {needed / 2**30:.1f} GiB of memory, and "
                f"{available / 2**30:.1f} GiB are available",
                fix="close other programs, add swap, or build on a larger machine and bring the bundle here",
            )


def weight_bytes_of(bundle: Bundle, name: str) -> int:
    """Return the bytes of a network's weights in the type it computes in."""
    from onnx import TensorProto

    from cvx_deploy.engines.tensorrt.network import onnx_model

    graph = onnx_model(bundle, name).graph
    computed = 8 * _SIZES[bundle.manifest.networks[name].precision]
    external = [tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    kinds = {kind: TensorProto.DataType.Name(kind) for kind in {tensor.data_type for tensor in external}}
    bits: int = sum(
        math.prod(tensor.dims) * _QUANTIZED_BITS.get(kinds[tensor.data_type], computed) for tensor in external
    )
    return bits // 8


def build_memory(weight_bytes: int) -> int:
    """Estimate the memory of a build, mapped weights left out, in bytes, from the bytes of the network's weights."""
    return _BUILD_BASE + int(_BUILD_PER_WEIGHT_BYTE * weight_bytes)
