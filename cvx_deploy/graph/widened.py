"""Networks that compute in bfloat16, made to compute in float32: where no kernel for bfloat16 is, a reference."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Network, TensorSpec

if TYPE_CHECKING:
    import onnx

_BF16, _FP32 = 16, 1  # onnx.TensorProto.BFLOAT16 and FLOAT
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


@dataclass(frozen=True, kw_only=True)
class Widened(Bundle):
    """A bundle whose networks compute in float32 what they computed in bfloat16; weights stay as they are stored.

    Attributes:
        source: The bundle it is made from.
        folder: Where altered graphs go.
    """

    source: Bundle
    folder: Path

    @classmethod
    def of(cls, source: Bundle, folder: Path) -> "Widened":
        """Return a bundle so widened; its graphs are made when they are asked for."""
        networks = {name: _in_fp32(network) for name, network in source.manifest.networks.items()}
        manifest = replace(source.manifest, networks=networks)
        return cls(path=source.path, manifest=manifest, index=source.index, source=source, folder=folder)

    def onnx_path(self, role: str) -> Path:
        """Return where the altered ONNX file of a role's network lies."""
        import onnx

        path = self.folder / f"{self.network_name(role)}.onnx"
        if not path.exists():
            model = onnx.load(self.source.onnx_path(role), load_external_data=False)
            widen(model)
            path.write_bytes(model.SerializeToString())
        return path

    def onnx_bytes(self, role: str) -> bytes:
        """Return the altered ONNX file of a role's network."""
        return self.onnx_path(role).read_bytes()

    def network(self, role: str) -> Network:
        """Return the network that plays a role."""
        return _in_fp32(self.source.network(role))


def _in_fp32(network: Network) -> Network:
    if network.precision != "bf16":
        return network
    inputs, outputs = (tuple(map(_spec_in_fp32, specs)) for specs in (network.inputs, network.outputs))
    return replace(network, precision="fp32", inputs=inputs, outputs=outputs)


def _spec_in_fp32(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype="float32") if spec.dtype == "bfloat16" else spec


def widen(model: "onnx.ModelProto") -> None:
    """Change a model so that it computes in float32 whatever it computed in bfloat16.

    Before::

        w (bfloat16), Cast(x, to=BFLOAT16) -> MatMul

    After::

        Cast(w, to=FLOAT), Cast(x, to=FLOAT) -> MatMul
    """
    casts = [_cast_weight(tensor) for tensor in model.graph.initializer if tensor.data_type == _BF16]
    del model.graph.value_info[:]  # what the graph's own types follow from stays
    _widen_nodes(model.graph.node)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == _BF16:
            value.type.tensor_type.elem_type = _FP32
    for function in model.functions:
        del function.value_info[:]
        _widen_nodes(function.node)
    for index, cast in enumerate(casts):
        model.graph.node.insert(index, cast)


def _cast_weight(tensor: "onnx.TensorProto") -> "onnx.NodeProto":
    """Rename a bfloat16 weight, and return the node that puts it out in float32 by its old name."""
    import onnx

    name, tensor.name = tensor.name, f"{tensor.name} stored"
    return onnx.helper.make_node("Cast", [tensor.name], [name], name=f"widened {name}", to=_FP32)


def _widen_nodes(nodes: Iterable["onnx.NodeProto"]) -> None:
    import onnx

    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i == _BF16:
                attribute.i = _FP32
            if attribute.t.data_type == _BF16:
                wide = onnx.numpy_helper.to_array(attribute.t).astype("float32")
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(wide, attribute.t.name))
            _widen_nodes(attribute.g.node)
