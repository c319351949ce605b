"""Repeating a traced block gives the very graph that tracing every block gives."""

import hashlib
from pathlib import Path

import onnx_ir as ir
import pytest

from cvx_deploy.bundle.safetensors import StoredTensor
from cvx_deploy.errors import CheckpointError
from cvx_deploy.exporters.cogvideox.text_encoder import TextEncoderContract
from cvx_deploy.exporters.cogvideox.transformer import TransformerContract
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.tracing import graph, trace
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.exporters.tracing.repeat import TRACED, Blocks, repeat_blocks
from cvx_deploy.shape import Shape
from tests.conftest import Tiny

LAYERS = 6

pytestmark = pytest.mark.export


def meaning(model: ir.Model) -> list[str]:
    """Return a hash of what every output is computed from: operators, attributes, weights, but no names of values."""
    known: dict[ir.Value, str] = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        known[value] = str(value.name)
    for node in model.graph:
        attributes = sorted((name, _attribute(value)) for name, value in node.attributes.items())
        inputs = [known[value] if value is not None else "" for value in node.inputs]
        text = repr((node.op_identifier(), attributes, inputs))
        for index, output in enumerate(node.outputs):
            known[output] = hashlib.sha256(f"{text}{index}".encode()).hexdigest()
    return [known[output] for output in model.graph.outputs]


def _attribute(value: ir.Attr) -> bytes:
    """Return an attribute as a file holds it, but for the name of a tensor."""
    if value.type == ir.AttributeType.TENSOR:
        return repr((value.value.dtype, value.value.shape)).encode() + value.value.tobytes()
    return ir.to_proto(value).SerializeToString(deterministic=True)


def deep(contract: type[NetworkContract], checkpoint: Path) -> NetworkContract:
    """Return the contract of a tiny network with more layers than are traced."""
    configs = Checkpoint(checkpoint).configs
    if contract is TextEncoderContract:
        return TextEncoderContract({**configs["text_encoder"], "num_layers": LAYERS}, "bf16", 226)
    config = {**configs["transformer"], "num_layers": LAYERS}
    return TransformerContract(config, "fp32", Shape(9, 80, 112), 8, 4)


def deep_tensors(contract: NetworkContract, checkpoint: Path) -> dict[str, StoredTensor]:
    """Return entries for all layers, each in a file of its own name, of the shapes of layer 1 (0, where 1 lacks it)."""
    stored = Checkpoint(checkpoint).tensors(contract.component)
    assert contract.blocks is not None
    path = contract.weight_names(contract.blocks.path)[0]
    for name, tensor in list(stored.items()):
        if name.startswith(f"{path}.1."):
            for layer in range(LAYERS):
                deeper = name.replace(f"{path}.1.", f"{path}.{layer}.")
                stored[deeper] = StoredTensor(deeper, tensor.dtype, tensor.shape, 0, tensor.nbytes)
    return stored


@pytest.mark.parametrize("contract", [TextEncoderContract, TransformerContract])
def test_repeated_blocks_mean_what_traced_blocks_mean(
    contract: type[NetworkContract], tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CVX_CACHE_DIR", str(tmp_path / "repeated"))
    network = deep(contract, tiny("5b"))
    tensors = deep_tensors(network, tiny("5b"))
    repeated = trace.onnx_from_contract(network, tensors, Path("here"))
    monkeypatch.setattr(Blocks, "traced", property(lambda blocks: blocks.count))
    monkeypatch.setenv("CVX_CACHE_DIR", str(tmp_path / "traced"))
    monkeypatch.setattr(graph, "repeat_blocks", lambda model, blocks: None)
    traced = trace.onnx_from_contract(deep(contract, tiny("5b")), tensors, Path("here"))
    assert meaning(repeated) == meaning(traced)
    assert repeated.graph.num_nodes() == traced.graph.num_nodes()
    assert set(repeated.graph.initializers) == set(traced.graph.initializers)
    other = next(value for name, value in repeated.graph.initializers.items() if f".{LAYERS - 2}." in name)
    other.name = "another weight"
    assert meaning(repeated) != meaning(traced)


def blocks_of_adds(constants: list[float]) -> ir.Model:
    """Build a chain of blocks, each of which adds a weight of its own and a constant."""
    value = start = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, weights = [], []
    for index, constant in enumerate(constants):
        name = f"blocks.{index}"
        weight = ir.Value(name=f"{name}.weight", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
        number = ir.node("Constant", [], attributes={"value_float": constant}, name=f"{name}/Constant")
        first = ir.node("Add", [value, weight], name=f"{name}/Add_0")
        second = ir.node("Add", [first.outputs[0], number.outputs[0]], name=f"{name}/Add_1")
        nodes += [number, first, second]
        weights.append(weight)
        value = second.outputs[0]
    graph = ir.Graph([start], [value], nodes=nodes, initializers=weights, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def test_every_block_is_fed_by_the_one_before_it() -> None:
    model = blocks_of_adds([1.0] * TRACED)
    repeat_blocks(model, Blocks("blocks", 9))
    assert meaning(model) == meaning(blocks_of_adds([1.0] * 9))


def test_few_blocks_are_left_as_they_are() -> None:
    model = blocks_of_adds([1.0] * 3)
    repeat_blocks(model, Blocks("blocks", 3))
    assert meaning(model) == meaning(blocks_of_adds([1.0] * 3))


def test_unlike_blocks_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not alike"):
        repeat_blocks(blocks_of_adds([1.0, 1.0, 2.0, 1.0]), Blocks("blocks", 9))
