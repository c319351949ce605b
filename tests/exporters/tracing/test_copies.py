"""A network of which one module of each kind was traced means what the straight trace of it does."""

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from cvx_deploy.errors import CheckpointError
from cvx_deploy.exporters.cogvideox.vae import VaeContract
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.tracing.copies import make_copies
from cvx_deploy.exporters.tracing.graph import graph_from_contract
from cvx_deploy.precision import Precision
from tests.conftest import Tiny
from tests.exporters.tracing.test_repeat import meaning

HERE = Path("here")
CHUNKS: list[tuple[str, int, bool, Precision]] = [
    ("vae_encoder", 1, True, "fp32"),
    ("vae_decoder_next", 2, False, "fp16"),
]
FURTHER: list[tuple[str, int, bool, Precision]] = [
    ("vae_encoder", 9, False, "fp32"),
    ("vae_encoder_next", 8, False, "bf16"),
    ("vae_decoder_first", 3, False, "fp32"),
]

pytestmark = pytest.mark.export


@pytest.mark.parametrize(
    ("name", "frames", "last", "precision"),
    [*CHUNKS, *(pytest.param(*chunk, marks=pytest.mark.nightly) for chunk in FURTHER)],
)
def test_copied_blocks_mean_what_traced_blocks_mean(
    name: str, frames: int, last: bool, precision: Precision, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = "2b" if (name, frames, last, precision) in CHUNKS else "1.5-5b"  # one of few layers, one of all
    config = Checkpoint(tiny(model)).configs["vae"]
    contract = VaeContract(config, precision, name, frames, last)
    copied = graph_from_contract(contract, HERE)
    monkeypatch.setattr(contract, "traceable", contract.module)
    traced = graph_from_contract(contract, HERE)
    assert meaning(copied) == meaning(traced)
    assert set(copied.graph.initializers) == set(traced.graph.initializers)
    other = next(value for name, value in copied.graph.initializers.items() if "resnets.1.conv2" in name)
    other.name = "another weight"
    assert meaning(copied) != meaning(traced)


def node(op_type: str, inputs: list[ir.Value | None], name: str, **attributes: str) -> ir.Node:
    domain = "cvx_deploy.marks" if attributes else ""
    made = ir.Node(domain, op_type, inputs, ir.convenience.convert_attributes(attributes), name=name)
    made.outputs[0].shape, made.outputs[0].type = ir.Shape([2]), ir.TensorType(ir.DataType.FLOAT)
    return made


def value(name: str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))


def marked(takes_input: bool) -> ir.Model:
    """Build two equal modules, the second as a mark, each of which adds its weight and, it may be, the input itself."""
    x, weight = value("x"), value("a.weight")
    enter = node("Enter", [x], "a/Enter", path="a", first="a")
    added = node("Add", [enter.outputs[0], weight], "a/Add")
    more = node("Mul", [added.outputs[0], x if takes_input else enter.outputs[0]], "a/Mul")
    leave = node("Leave", [more.outputs[0]], "a/Leave", path="a", first="a")
    again = node("Again", [leave.outputs[0]], "b/Again", path="b", first="a")
    nodes = [enter, added, more, leave, again]
    graph = ir.Graph([x], [again.outputs[0]], nodes=nodes, initializers=[weight], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def test_a_copy_has_the_inputs_and_the_weights_of_its_own_place() -> None:
    model = marked(takes_input=False)
    make_copies(model)
    first, second = value("x"), value("a.weight")
    added = node("Add", [first, second], "a/Add")
    one = node("Mul", [added.outputs[0], first], "a/Mul")
    weight = value("b.weight")
    other = node("Add", [one.outputs[0], weight], "b/Add")
    two = node("Mul", [other.outputs[0], one.outputs[0]], "b/Mul")
    nodes = [added, one, other, two]
    written = ir.Graph([first], [two.outputs[0]], nodes=nodes, initializers=[second, weight], name="g")
    assert meaning(model) == meaning(ir.Model(written, ir_version=10))
    assert [each.name for each in model.graph] == [each.name for each in nodes]


def test_a_module_that_takes_what_is_not_among_its_inputs_is_refused() -> None:
    with pytest.raises(CheckpointError, match="a takes x from elsewhere"):
        make_copies(marked(takes_input=True))


def test_a_block_that_is_configured_otherwise_is_no_copy(tiny: Tiny) -> None:
    contract = VaeContract(Checkpoint(tiny("5b")).configs["vae"], "fp32", "vae_encoder", 1, last=True)
    blocks = [module for module in contract.module().modules() if type(module).__name__ == "CogVideoXResnetBlock3D"]
    kinds = {repr(block) for block in blocks}
    norm = blocks[1].get_submodule("norm1")
    assert isinstance(norm, torch.nn.GroupNorm)
    norm.eps = 0.5
    assert repr(blocks[1]) not in kinds
