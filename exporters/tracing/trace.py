"""A contract and a checkpoint in, an ONNX model out, whose weights stay where they are.

The weights of the traced graph are pointed at their bytes in the checkpoint's safetensors files. Nothing is loaded,
nothing is copied.
"""

from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from cvx_deploy.bundle.safetensors import StoredTensor
from cvx_deploy.errors import CheckpointError
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.exporters.tracing.kept import kept_graph
from cvx_deploy.graph.rewrites import rewrite
from cvx_deploy.quantize.placement import Placement, quantize_graph

_IR_DTYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "I8": ir.DataType.INT8,
    "I4": ir.DataType.INT4,
}
_FLOATING = {"F64", "F32", "F16", "BF16"}


def onnx_from_contract(
    contract: NetworkContract,
    tensors: dict[str, StoredTensor],
    where: Path,
    rewrites: Collection[str] | None = None,
    placement: Placement | None = None,
) -> ir.Model:
    """Trace a network, rewrite its graph, and bind its weights.

    Args:
        contract: What to trace.
        tensors: Every tensor of the checkpoint's component by name.
        where: The component's folder, for error messages.
        rewrites: Which of `REWRITES` to apply; None for all.
        placement: What to quantize; the tensors are then those of `quantize_component`.

    Returns:
        The model, its initializers external, each in the file `weight_location` names.

    Raises:
        CheckpointError: A tensor is missing, or has another shape or type than the config says.
    """
    model = kept_graph(contract, where)
    rewrite(model, rewrites)
    if placement is not None:
        quantize_graph(model, placement, lambda name: contract.weight_names(name)[0])
    _bind_weights(model, contract, tensors, where)
    for simplify in (
        passes.RemoveUnusedNodesPass(),
        passes.IdentityEliminationPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        simplify(model)
    return model


def weight_location(file: str) -> str:
    """Return the plain name under which ONNX files and the manifest know a checkpoint's weight file."""
    return file.replace("/", ".")


def _bind_weights(model: ir.Model, contract: NetworkContract, tensors: dict[str, StoredTensor], where: Path) -> None:
    constants = contract.constants()
    for name, value in list(model.graph.initializers.items()):
        if name in constants:
            value.const_value = ir.tensor(constants[name], name=name)
            continue
        stored = next(((known, tensors[known]) for known in contract.weight_names(name) if known in tensors), None)
        if stored is None:
            raise CheckpointError(
                f"{where} has no tensor {contract.weight_names(name)[0]}",
                fix="the checkpoint and its config.json do not belong together: fetch both again",
            )
        _point_at(model, value, *stored, where)


def _point_at(model: ir.Model, value: ir.Value, known: str, stored: StoredTensor, where: Path) -> None:
    """Give an initializer its bytes in the checkpoint, with a Cast after it where the stored type is another."""
    assert value.shape is not None
    if tuple(value.shape) != stored.shape:
        raise CheckpointError(
            f"{where}: tensor {known} has shape {list(stored.shape)}, the config asks for {list(value.shape)}",
            fix="the checkpoint and its config.json do not belong together: fetch both again",
        )
    # A type of 8 or 4 bits belongs to a layer that the graph dequantizes: without a scale its values say nothing.
    if stored.dtype not in _IR_DTYPES or (stored.dtype not in _FLOATING and _IR_DTYPES[stored.dtype] != value.dtype):
        raise CheckpointError(
            f"{where}: tensor {known} is {stored.dtype}", fix="use a checkpoint of floating point weights"
        )
    dtype = _IR_DTYPES[stored.dtype]
    assert value.name is not None
    name = value.name
    tensor = ir.ExternalTensor(
        weight_location(stored.file), stored.offset, stored.nbytes, dtype, shape=ir.Shape(stored.shape), name=name
    )
    if value.dtype == dtype:
        value.const_value = tensor
        return
    wanted = value.dtype
    assert wanted is not None
    source = ir.Value(name=name, shape=ir.Shape(stored.shape), type=ir.TensorType(dtype), const_value=tensor)
    cast = ir.node("Cast", [source], attributes={"to": wanted}, name=f"{name}/Cast")
    cast.outputs[0].name = f"{name}.{wanted.name.lower()}"
    cast.outputs[0].shape, cast.outputs[0].type = ir.Shape(stored.shape), ir.TensorType(wanted)
    value.replace_all_uses_with(cast.outputs[0])
    del model.graph.initializers[name]
    model.graph.initializers[name] = source
    model.graph.insert_before(model.graph[0], cast)
