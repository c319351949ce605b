"""Every rewrite finds its place in the networks it is for, and changes nothing that they compute."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from cvx_deploy.exporters.export import ExportRequest, shapes_of
from cvx_deploy.exporters.networks import contracts_for
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.exporters.tracing.trace import onnx_from_contract, weight_location
from cvx_deploy.graph.rewrites import REWRITES, rewrite
from cvx_deploy.precision import Precision
from cvx_deploy.quantize.recipe import Recipe
from tests.conftest import Tiny
from tests.tolerances import REWRITE_RELATIVE

SIZES = {"batch": 2, "latent_height": 6, "latent_width": 8}

pytestmark = pytest.mark.export
PLACES: dict[str, tuple[str, Precision]] = {
    "rope": ("transformer", "fp32"),
    "joint": ("transformer", "fp16"),
    "layer_norm": ("transformer", "fp16"),
    "frames": ("vae_decoder_first", "fp16"),
    "upsample": ("vae_decoder_first", "fp32"),
}


def contract_of(checkpoint: Checkpoint, role: str, precision: Precision) -> NetworkContract:
    (shape,) = shapes_of(ExportRequest("5b", checkpoint.root), checkpoint)
    return next(
        contract
        for contract in contracts_for(checkpoint, shape, Recipe.parse(precision, "bf16"))
        if contract.name == role
    )


def model_of(
    checkpoint: Checkpoint, role: str, precision: Precision, rewrites: tuple[str, ...]
) -> tuple[ir.Model, NetworkContract]:
    contract = contract_of(checkpoint, role, precision)
    where = checkpoint.place(contract.component)
    return onnx_from_contract(contract, checkpoint.tensors(contract.component), where, rewrites), contract


def output(checkpoint: Checkpoint, model: ir.Model, contract: NetworkContract) -> NDArray[Any]:
    """Run a graph on seeded inputs."""
    files = {weight_location(tensor.file): tensor.file for tensor in checkpoint.tensors(contract.component).values()}
    arrays = [np.fromfile(checkpoint.place(file), np.uint8) for file in files.values()]
    options = onnxruntime.SessionOptions()
    options.add_external_initializers_from_files_in_memory(list(files), arrays, [array.nbytes for array in arrays])
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    rng = np.random.default_rng(0)
    feeds = {spec.name: rng.standard_normal(spec.resolve(SIZES)).astype(spec.dtype) for spec in contract.input_specs}
    found: NDArray[Any] = session.run(None, feeds)[0]
    return found


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_every_rewrite_has_its_place_here() -> None:
    assert set(PLACES) == set(REWRITES)


@pytest.mark.parametrize("name", list(PLACES))
def test_a_rewrite_applies_and_changes_nothing(name: str, tiny: Tiny) -> None:
    role, precision = PLACES[name]
    checkpoint = Checkpoint(tiny("5b"))
    straight, contract = model_of(checkpoint, role, precision, ())
    rewritten, _ = model_of(checkpoint, role, precision, (name,))
    kinds = [[node.op_type for node in model.graph] for model in (straight, rewritten)]
    assert kinds[0] != kinds[1]
    expected, found = (output(checkpoint, model, contract) for model in (straight, rewritten))
    assert relative(found, expected) < REWRITE_RELATIVE[precision]


def test_twin_another_weight_is_found(tiny: Tiny) -> None:
    checkpoint = Checkpoint(tiny("5b"))
    model, contract = model_of(checkpoint, "transformer", "fp16", ())
    expected = output(checkpoint, model, contract)
    queries, keys = (
        next(node for node in model.graph if node.op_type == "LayerNormalization" and part in str(node.name))
        for part in ("norm_q", "norm_k")
    )
    queries.replace_input_with(0, keys.inputs[0])
    assert relative(output(checkpoint, model, contract), expected) > REWRITE_RELATIVE["fp16"]


def test_a_rewrite_that_does_not_exist_is_named() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}), ir_version=10)
    with pytest.raises(ValueError, match="there is no rewrite rhope; there are rope"):
        rewrite(model, ["rhope"])
