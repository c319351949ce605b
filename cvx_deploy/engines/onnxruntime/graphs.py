"""The form of a graph that ONNX Runtime has the kernels for: made when it is loaded, in memory."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from onnxruntime import InferenceSession, SessionOptions

from cvx_deploy.bundle.schema import Network
from cvx_deploy.graph.moves_in_float32 import move_in_float32
from cvx_deploy.graph.restored_layer_norm import restore_layer_norms
from cvx_deploy.graph.rotary import rotate_at_once
from cvx_deploy.graph.streamed import LARGE_NETWORK, Streamed, stream_weights
from cvx_deploy.graph.tiled_attention import attend_in_tiles, holds_large_scores, is_transformer

if TYPE_CHECKING:
    from onnx import ModelProto


def graph_for_cpu(graph: bytes, network: Network, sizes: Mapping[str, int]) -> bytes:
    """Return an ONNX file, weights outside of it, as the CPU is to run it at these sizes."""
    if not is_transformer(network):
        return graph
    import onnx

    model = onnx.ModelProto.FromString(graph)
    changed = rotate_at_once(model, computed)
    if holds_large_scores(network, dict(sizes)):
        changed += attend_in_tiles(model)
    return bytes(model.SerializeToString()) if changed else graph


def streams(network: Network, weight_bytes: int) -> bool:
    """Whether a network's weights stay in their file; see `cvx_deploy.graph.streamed`.

    In 8-bit products weights must be constants, and for 4 bits there are kernels that read them as they are.
    """
    scheme = None if network.quantization is None else network.quantization.scheme
    return weight_bytes >= LARGE_NETWORK and scheme in (None, "int8wo")


def streamed(graph: bytes, network: Network, weight_bytes: int) -> tuple[bytes, list[Streamed]]:
    """Return an ONNX file as it is to be run with so many bytes of weights, and which of them are its inputs."""
    if not streams(network, weight_bytes):
        return graph, []
    import onnx

    model = onnx.ModelProto.FromString(graph)
    weights = stream_weights(model)
    return (bytes(model.SerializeToString()), weights) if weights else (graph, [])


def computed(model: "ModelProto") -> list[NDArray[Any]]:
    """Return what a graph without inputs puts out."""
    options = SessionOptions()
    options.intra_op_num_threads, options.enable_cpu_mem_arena = 1, False  # it is small, and soon gone
    outputs: list[NDArray[Any]] = InferenceSession(model.SerializeToString(), options).run(None, {})
    return outputs


def graph_for_cuda(graph: bytes, network: Network) -> bytes:
    """Return an ONNX file, weights outside of it, as CUDA is to run it; one of float32 is right as it is."""
    if network.precision == "fp32":
        return graph
    import onnx

    model = onnx.ModelProto.FromString(graph)
    changed = restore_layer_norms(model) + move_in_float32(model)
    return bytes(model.SerializeToString()) if changed else graph
